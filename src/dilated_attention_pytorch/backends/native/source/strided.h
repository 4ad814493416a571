/* A strided plan: a unit is some rows of a chunk for one sample and head forward, rows by keys of a region backward. */
#ifndef DA_STRIDED_H
#define DA_STRIDED_H

#include "backward.h"
#include "forward.h"

/* Places of one segment of a piece: x in [x_low, x_high) of the queries, y in [y_low, y_high) of the keys. */
typedef struct {
  int64_t q_row, q_step, x_low, x_high; /* row of place 0 among the tensor's rows, and rows between places */
  int64_t k_row, k_step, y_low, y_high;
  int64_t low, high;
} Segment;

/* The places whose rows lie in [low, high). */
INLINE void places_in(int64_t start, int64_t step, int64_t length, int64_t low, int64_t high, int64_t *first,
                      int64_t *last) {
  *first = most(0, ceil_div(low - start, step));
  *last = least(length, ceil_div(high - start, step));
}

/* Segment s of a piece for query rows [q_low, q_high) and key rows [k_low, k_high); 0 when nothing is left of it. */
static int cut_segment(const Chunk *c, const Piece *piece, int64_t s, int64_t q_low, int64_t q_high, int64_t k_low,
                       int64_t k_high, Segment *seg) {
  seg->q_row = c->q_low + piece->q_start + s * piece->q_stride;
  seg->k_row = c->k_low + piece->k_start + s * piece->k_stride;
  seg->q_step = piece->q_step;
  seg->k_step = piece->k_step;
  seg->low = piece->low;
  seg->high = piece->high;
  places_in(seg->q_row, seg->q_step, piece->q_length, q_low, q_high, &seg->x_low, &seg->x_high);
  places_in(seg->k_row, seg->k_step, piece->k_length, k_low, k_high, &seg->y_low, &seg->y_high);
  if (seg->x_low >= seg->x_high) return 0;
  seg->y_low = most(seg->y_low, seg->x_low + seg->low);
  seg->y_high = least(seg->y_high, seg->x_high + seg->high);
  return seg->y_low < seg->y_high;
}

/* The rule between query place x and key place y of a segment, positions included. */
static Rule rule_at(const Problem *c, Work *w, const Segment *seg, int64_t head, int64_t x, int64_t y, int64_t n) {
  Rule r = {.low = seg->low + x - y, .high = seg->high + x - y};
  if (c->q_at) {
    for (int64_t i = 0; i < n; i++) w->at[i] = c->q_at[seg->q_row + (x + i) * seg->q_step];
    for (int64_t i = n; i < QB; i++) w->at[i] = w->at[n - 1];
    r.q_at = w->at;
    r.k_at = c->k_at + seg->k_row + y * seg->k_step;
    r.k_step = seg->k_step;
    if (c->slopes) r.slope = c->slopes[head];
    else r.table = c->table + head * c->table_stride + c->reach;
    r.reach = c->reach;
  }
  return r;
}

/* Where the running out and lse of a unit's rows lie: float32 rows, in `out` itself or in work memory. */
typedef struct {
  char *rows;
  int64_t stride, first; /* the row at `rows` */
  float *lse;
  int64_t lse_stride;
} State;

INLINE char *state_row(const State *s, int64_t row) { return s->rows + 4 * (row - s->first) * s->stride; }
INLINE float *state_lse(const State *s, int64_t row) { return s->lse + row * s->lse_stride; }

/* All keys of one segment for its queries in this unit. */
static void forward_segment(const Problem *c, Work *w, const State *state, int64_t sample, int64_t head,
                            const Segment *seg, int fresh) {
  int64_t dim = c->dim, dim_v = up(c->value_dim, JD), size = item(c->dtype);
  int64_t q_stride = c->q.token * seg->q_step, k_stride = c->k.token * seg->k_step, v_stride = c->v.token * seg->k_step;
  int in_place = c->dtype == F32 && seg->x_high - seg->x_low <= QB && dim_v == c->value_dim;
  int64_t step = in_place ? seg->y_high - seg->y_low : c->pack_keys;
  for (int64_t y = seg->y_low; y < seg->y_high; y += step) {
    int64_t end = least(y + step, seg->y_high), row = seg->k_row + y * seg->k_step;
    const char *k = at_row(&c->k, size, sample, row, head / c->group);
    const char *v = at_row(&c->v, size, sample, row, head / c->group);
    if (!in_place) {
      pack(w->k, dim, k, k_stride, end - y, dim, (int)c->dtype);
      pack(w->v, dim_v, v, v_stride, end - y, c->value_dim, (int)c->dtype);
    }
    for (int64_t x = seg->x_low; x < seg->x_high; x += QB) {
      int64_t n = least(QB, seg->x_high - x), q_row = seg->q_row + x * seg->q_step;
      int64_t first = most(seg->y_low, x + seg->low), low = most(first, y);
      int64_t high = least(end, x + n + seg->high);
      if (low >= high) continue;
      load_lanes(w->qt, at_row(&c->q, size, sample, q_row, head), q_stride, n, lanes_of(n), dim, (int)c->dtype,
                 (float)(c->scale * LOG2E));
      char *rows = state_row(state, q_row);
      float *lse = state_lse(state, q_row);
      if (fresh && low == first) start_empty(w, dim_v, lanes_of(n));
      else start_stored(w, dim_v, rows, state->stride * seg->q_step, lse, state->lse_stride * seg->q_step, n,
                        c->value_dim);
      Rule rule = rule_at(c, w, seg, head, x, low, n);
      if (in_place)
        forward_keys(w, dim, dim_v, (const float *)k + (low - y) * k_stride, k_stride,
                     (const float *)v + (low - y) * v_stride, v_stride, high - low, &rule, n);
      else
        forward_keys(w, dim, dim_v, w->k + (low - y) * dim, dim, w->v + (low - y) * dim_v, dim_v, high - low, &rule, n);
      finish(w, rows, state->stride * seg->q_step, F32, lse, state->lse_stride * seg->q_step, n, c->value_dim);
    }
  }
}

/* The number of the interval that holds x, among n with ascending starts (n + 1 of them). */
INLINE int64_t find(const int64_t *starts, int64_t n, int64_t x) {
  int64_t low = 0, high = n;
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    if (starts[middle] <= x) low = middle;
    else high = middle;
  }
  return low;
}

static void forward_strided(const Problem *c, Work *w, int64_t unit) {
  int64_t number = find(c->first_unit, c->num_chunks, unit);
  const Chunk *chunk = c->chunks + number;
  int64_t parts = ceil_div(chunk->q_high - chunk->q_low, c->part_rows), local = unit - c->first_unit[number];
  int64_t part = local % parts, head = chunk->head + local / parts % chunk->heads * chunk->head_step;
  int64_t sample = chunk->first_sample + local / (parts * chunk->heads);
  int64_t low = chunk->q_low + part * c->part_rows, high = least(low + c->part_rows, chunk->q_high);
  char *out = at_row(&c->out, item(c->out_dtype), sample, low, head);
  State state = {out, c->out.token, low, (float *)at_row(&c->lse, 4, sample, 0, head), c->lse.token};
  if (c->out_dtype != F32) state.rows = (char *)w->state, state.stride = c->value_dim;
  if (!chunk->complete)
    for (int64_t row = low; row < high; row++) {
      memset(state_row(&state, row), 0, (size_t)c->value_dim * 4);
      *state_lse(&state, row) = -INFINITY;
    }
  for (int64_t i = 0; i < chunk->pieces; i++) {
    const Piece *piece = c->pieces + chunk->first_piece + i;
    Segment seg;
    for (int64_t s = 0; s < piece->segments; s++)
      if (cut_segment(chunk, piece, s, low, high, chunk->k_low, chunk->k_high, &seg))
        forward_segment(c, w, &state, sample, head, &seg, (int)piece->fresh);
  }
  if (c->out_dtype != F32)
    for (int64_t row = low; row < high; row++)
      for (int64_t d = 0; d < c->value_dim; d += W)
        store_row(out, (row - low) * c->out.token + d, c->value_dim - d, (int)c->out_dtype,
                  load_row(state_row(&state, row), d, c->value_dim - d, F32));
}

/* All keys of one segment for its queries: adds to dq, dk and dv. */
static void backward_segment(const Problem *c, Work *w, int64_t sample, int64_t head, const Segment *seg) {
  int64_t size = item(c->dtype), kv_head = head / c->group;
  for (int64_t y = seg->y_low; y < seg->y_high; y += c->pack_keys) {
    int64_t end = least(y + c->pack_keys, seg->y_high), row = seg->k_row + y * seg->k_step;
    backward_pack(c, w, at_row(&c->k, size, sample, row, kv_head), c->k.token * seg->k_step,
                  at_row(&c->v, size, sample, row, kv_head), c->v.token * seg->k_step, end - y);
    for (int64_t x = seg->x_low; x < seg->x_high; x += QB) {
      int64_t n = least(QB, seg->x_high - x);
      int64_t low = most(y, x + seg->low), high = least(end, x + n + seg->high);
      if (low >= high) continue;
      backward_start(c, w, sample, head, seg->q_row + x * seg->q_step, seg->q_step, n);
      Rule rule = rule_at(c, w, seg, head, x, low, n);
      backward_keys(c, w, low - y, high - low, &rule, n);
      backward_finish(c, w, sample, head, seg->q_row + x * seg->q_step, seg->q_step, n);
    }
    backward_scatter(c, w, sample, kv_head, row, seg->k_step, end - y);
  }
}

/* Part i of the query rows against part j of the key rows of one region, sample and kv head. In a wave every i meets
 * another j, so units that run together never share a row of dq, dk or dv. */
static void backward_strided(const Problem *c, Work *w, int64_t wave, int64_t task) {
  int64_t base = task / c->parts, i = task % c->parts, j = (i + wave) % c->parts;
  int64_t number = find(c->first_base, c->num_regions, base), local = base - c->first_base[number];
  const Region *r = c->regions + number;
  int64_t kv_heads = c->heads / c->group, sample = r->first_sample + local / kv_heads, kv_head = local % kv_heads;
  int64_t q_part = up(ceil_div(r->q_high - r->q_low, c->parts), QB), k_part = ceil_div(r->k_high - r->k_low, c->parts);
  int64_t q_low = r->q_low + i * q_part, q_high = least(q_low + q_part, r->q_high);
  int64_t k_low = r->k_low + j * k_part, k_high = least(k_low + k_part, r->k_high);
  for (int64_t head = kv_head * c->group; head < (kv_head + 1) * c->group; head++) {
    int32_t at = c->region_chunks[number * c->heads + head];
    if (at < 0) continue;
    const Chunk *chunk = c->chunks + at;
    for (int64_t p = 0; p < chunk->pieces; p++) {
      const Piece *piece = c->pieces + chunk->first_piece + p;
      Segment seg;
      for (int64_t s = 0; s < piece->segments; s++)
        if (cut_segment(chunk, piece, s, q_low, q_high, k_low, k_high, &seg))
          backward_segment(c, w, sample, head, &seg);
    }
  }
}

#endif
