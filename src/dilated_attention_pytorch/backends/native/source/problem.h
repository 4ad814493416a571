/* What Python hands over, and one thread's work memory.
 *
 * Legend: B samples, H query heads, D head dim, Dv value dim; a tile is QB query rows, lanes of vectors; places count
 * the rows of a piece. All offsets are 64-bit. The structs mirror those of library.py; da_layout() checks their sizes.
 */
#ifndef DA_PROBLEM_H
#define DA_PROBLEM_H

#include <math.h>
#include <stdlib.h>

#include "vectors.h"

#define KB 96 /* keys of one softmax block; sums are kept per block */
#define LOG2E 1.44269504088896340736f
#define LN2 0.69314718055994530942f
#define LOWEST (-3.4028234663852886e38f) /* the running maximum before any key; finite, so that differences are no NaN */

typedef struct {
  char *data;
  int64_t batch, token, head; /* strides in elements; the last dim has stride 1 */
} Array;

/* One dense problem of a plan: rows start + s * stride + m * step for s < segments, m < length, of queries and keys.
 * Key place y is visible to query place x when low <= y - x <= high. */
typedef struct {
  int64_t segments, q_start, q_step, q_length, q_stride, k_start, k_step, k_length, k_stride, low, high, fresh;
} Piece;

typedef struct {
  int64_t first_sample, last_sample, head, head_step, heads, q_low, q_high, k_low, k_high, first_piece, pieces, complete;
} Chunk;

/* Chunks that share rows, head for head: what one backward unit owns. */
typedef struct {
  int64_t first_sample, last_sample, q_low, q_high, k_low, k_high;
} Region;

/* Lists of tiles by query block; strides of 0 repeat them over samples or heads. */
typedef struct {
  const int32_t *num, *idx, *value;
  int64_t batch, head, width; /* strides of num in blocks; idx and value have width entries for each block */
} Lists;

/* GOMP_parallel of the OpenMP library that the process holds already: `threads` calls of work(data) at once. */
typedef void (*Team)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

typedef struct {
  Team team; /* or NULL: threads are started for the call */
  int64_t dtype, out_dtype, batch, queries, keys, heads, group, dim, value_dim; /* out may be float32 beside halves */
  int64_t pack_keys, part_rows, parts, threads;
  double scale;
  Array q, k, v, out, lse, dout, dlse, dq, dk, dv, delta; /* lse, dlse, delta, dq, dk, dv are float32 */
  const float *slopes, *table;                            /* in base 2: already times log2(e) */
  int64_t table_stride, reach;
  const int32_t *q_at, *k_at; /* positions of the rows, only where a score asks for them */
  /* a strided plan */
  const Chunk *chunks;
  const Piece *pieces;
  const int64_t *first_unit; /* (chunks + 1) forward units before each chunk */
  int64_t num_chunks;
  const Region *regions;
  const int32_t *region_chunks; /* (regions, heads): the chunk of each head, -1 for none */
  const int64_t *first_base;    /* (regions + 1) units before each region */
  int64_t num_regions;
  /* or a tile plan */
  int64_t is_tiled, block_q, block_k;
  Lists partial, full;
  const uint8_t *counts; /* (tables, block_k, count_row), lanes last, of 1 or 4 bytes each */
  int64_t count_row;     /* bytes */
  const int64_t *visible; /* (B): keys before the padding, or NULL */
} Problem;

/* How logits of a block of keys change before the softmax. */
typedef struct {
  int64_t low, high;              /* key y - lane x must lie within; both relative to the block's first key */
  const uint8_t *counts;          /* of lane 0 and the block's first key, or NULL */
  int64_t count_row, count_size;  /* bytes from key to key, and from lane to lane: 1, or 4 for an int32_t */
  float add;                      /* log2 of a full tile's count */
  float slope;                    /* ALiBi, in base 2 */
  const float *table;             /* relative bias, in base 2, its middle is distance 0; or NULL */
  int64_t reach;
  const int32_t *q_at, *k_at;     /* positions of the lanes, and of the first key; NULL without a score */
  int64_t k_step;
} Rule;

#define UNBOUNDED ((int64_t)1 << 40)

typedef struct {
  float *memory;
  float *qt, *ot, *p, *k, *v, *state;          /* (D, QB) (Dv4, QB) (KB, QB) (pack, D4) (pack, Dv4) (rows, Dv) */
  float *gt, *s, *q, *g, *dk, *dv;             /* (Dv, QB) (KB, QB) (QB, Dw) (QB, Dvw) (pack, Dw) (pack, Dvw) */
  float *m, *l;                                /* (QB): running maximum and sum; backward: lse in base 2 and delta */
  int32_t *at;                                 /* (QB): positions of the lanes */
  int64_t *tags, tag_sample, tag_head, slots;  /* which key block each slot of k and v holds */
} Work;

INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

INLINE char *at_row(const Array *x, int64_t size, int64_t sample, int64_t row, int64_t head) {
  return x->data + size * (sample * x->batch + row * x->token + head * x->head);
}

INLINE int64_t item(int64_t dtype) { return dtype == F32 ? 4 : 2; }

#endif
