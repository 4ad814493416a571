/* A tile plan: query blocks visit the key blocks of their lists; a unit is some query blocks of one sample and head. */
#ifndef DA_TILED_H
#define DA_TILED_H

#include "backward.h"
#include "forward.h"

/* One tile list of a query block. */
typedef struct {
  const int32_t *idx, *value;
  int64_t first, last;
} Visits;

/* The entries of a query block's list that name key blocks in [low, high). */
static Visits visits_of(const Lists *lists, int64_t sample, int64_t head, int64_t block, int64_t low, int64_t high) {
  int64_t at = sample * lists->batch + head * lists->head + block, num = lists->num[at];
  Visits v = {lists->idx + at * lists->width, lists->value + at * lists->width, 0, num};
  for (int64_t end = num; v.first < end;) { /* the first entry not below `low` */
    int64_t middle = (v.first + end) / 2;
    if (v.idx[middle] < low) v.first = middle + 1;
    else end = middle;
  }
  for (v.last = v.first; v.last < num && v.idx[v.last] < high;) v.last++;
  return v;
}

/* The rule of one tile for its lanes from row x of the query block on. */
static Rule tile_rule(const Problem *c, Work *w, int partial, int32_t value, int64_t head, int64_t row, int64_t x,
                      int64_t key_row, int64_t n) {
  Rule r = {.low = -UNBOUNDED, .high = UNBOUNDED};
  if (partial) {
    r.count_row = c->count_row;
    r.count_size = c->count_row / up(c->block_q, QB);
    r.counts = c->counts + (int64_t)value * c->block_k * c->count_row + x * r.count_size;
  } else r.add = value == 1 ? 0 : log2f((float)value);
  if (c->q_at) {
    for (int64_t i = 0; i < QB; i++) w->at[i] = c->q_at[row + least(i, n - 1)];
    r.q_at = w->at;
    r.k_at = c->k_at + key_row;
    r.k_step = 1;
    if (c->slopes) r.slope = c->slopes[head];
    else r.table = c->table + head * c->table_stride + c->reach;
    r.reach = c->reach;
  }
  return r;
}

/* Rows of a block of keys that exist, and those that are not padding; hidden rows are packed as zeros. */
INLINE int64_t visible_rows(const Problem *c, int64_t sample, int64_t row, int64_t n) {
  return c->visible ? most(0, least(n, c->visible[sample] - row)) : n;
}

static void pack_visible(const Problem *c, const Array *x, float *to, int64_t width, int64_t dim, int64_t sample,
                         int64_t kv_head, int64_t row, int64_t n) {
  int64_t seen = visible_rows(c, sample, row, n);
  pack(to, width, at_row(x, item(c->dtype), sample, row, kv_head), x->token, seen, dim, (int)c->dtype);
  memset(to + seen * width, 0, (size_t)((n - seen) * width) * 4);
}

/* The packed key block, from its slot or made now; slots belong to one sample and kv head. */
static int64_t slot_of(const Problem *c, Work *w, int64_t sample, int64_t kv_head, int64_t block) {
  if (w->tag_sample != sample || w->tag_head != kv_head) {
    for (int64_t i = 0; i < w->slots; i++) w->tags[i] = -1;
    w->tag_sample = sample;
    w->tag_head = kv_head;
  }
  int64_t slot = block % w->slots, row = block * c->block_k, n = least(c->block_k, c->keys - row);
  if (w->tags[slot] != block) {
    int64_t dim_v = up(c->value_dim, JD), place = slot * c->block_k;
    pack_visible(c, &c->k, w->k + place * c->dim, c->dim, c->dim, sample, kv_head, row, n);
    pack_visible(c, &c->v, w->v + place * dim_v, dim_v, c->value_dim, sample, kv_head, row, n);
    w->tags[slot] = block;
  }
  return slot * c->block_k;
}

static void forward_tile(const Problem *c, Work *w, int64_t sample, int64_t head, int64_t row, int64_t x, int64_t n,
                         const Visits visits[2]) {
  int64_t size = item(c->dtype), dim_v = up(c->value_dim, JD);
  load_lanes(w->qt, at_row(&c->q, size, sample, row, head), c->q.token, n, lanes_of(n), c->dim, (int)c->dtype,
             (float)(c->scale * LOG2E));
  start_empty(w, dim_v, lanes_of(n));
  for (int partial = 0; partial < 2; partial++)
    for (int64_t i = visits[partial].first; i < visits[partial].last; i++) {
      int64_t block = visits[partial].idx[i], key_row = block * c->block_k;
      int64_t place = slot_of(c, w, sample, head / c->group, block);
      Rule rule = tile_rule(c, w, partial, visits[partial].value[i], head, row, x, key_row, n);
      forward_run(w, c->dim, dim_v, w->k + place * c->dim, c->dim, w->v + place * dim_v, dim_v,
                  least(c->block_k, c->keys - key_row), &rule, n);
    }
  finish(w, at_row(&c->out, item(c->out_dtype), sample, row, head), c->out.token, (int)c->out_dtype,
         (float *)at_row(&c->lse, 4, sample, row, head), c->lse.token, n, c->value_dim);
}

INLINE int64_t blocks_per_unit(const Problem *c) { return most(1, c->part_rows / c->block_q); }

static void forward_tiled(const Problem *c, Work *w, int64_t unit) {
  int64_t blocks = ceil_div(c->queries, c->block_q), each = blocks_per_unit(c), units = ceil_div(blocks, each);
  int64_t part = unit % units, head = unit / units % c->heads, sample = unit / (units * c->heads);
  int64_t key_blocks = ceil_div(c->keys, c->block_k);
  for (int64_t block = part * each; block < least((part + 1) * each, blocks); block++) {
    Visits visits[2] = {visits_of(&c->full, sample, head, block, 0, key_blocks),
                        visits_of(&c->partial, sample, head, block, 0, key_blocks)};
    int64_t row = block * c->block_q, rows = least(c->block_q, c->queries - row);
    for (int64_t x = 0; x < rows; x += QB)
      forward_tile(c, w, sample, head, row + x, x, least(QB, rows - x), visits);
  }
}

/* The query blocks [low, high) of a head against the packed key blocks [first, last). */
static void backward_super(const Problem *c, Work *w, int64_t sample, int64_t head, int64_t low, int64_t high,
                           int64_t first, int64_t last) {
  for (int64_t block = low; block < high; block++) {
    Visits visits[2] = {visits_of(&c->full, sample, head, block, first, last),
                        visits_of(&c->partial, sample, head, block, first, last)};
    if (visits[0].first == visits[0].last && visits[1].first == visits[1].last) continue;
    int64_t row = block * c->block_q, rows = least(c->block_q, c->queries - row);
    for (int64_t x = 0; x < rows; x += QB) {
      int64_t n = least(QB, rows - x);
      backward_start(c, w, sample, head, row + x, 1, n);
      for (int partial = 0; partial < 2; partial++)
        for (int64_t i = visits[partial].first; i < visits[partial].last; i++) {
          int64_t key_row = visits[partial].idx[i] * c->block_k;
          Rule rule = tile_rule(c, w, partial, visits[partial].value[i], head, row + x, x, key_row, n);
          backward_keys(c, w, key_row - first * c->block_k, least(c->block_k, c->keys - key_row), &rule, n);
        }
      backward_finish(c, w, sample, head, row + x, 1, n);
    }
  }
}

/* Part i of the query blocks against part j of the key blocks of one sample and kv head; see backward_strided. */
static void backward_tiled(const Problem *c, Work *w, int64_t wave, int64_t task) {
  int64_t base = task / c->parts, i = task % c->parts, j = (i + wave) % c->parts;
  int64_t kv_heads = c->heads / c->group, sample = base / kv_heads, kv_head = base % kv_heads;
  int64_t blocks = ceil_div(c->queries, c->block_q), key_blocks = ceil_div(c->keys, c->block_k);
  int64_t q_part = ceil_div(blocks, c->parts), k_part = ceil_div(key_blocks, c->parts);
  int64_t each = most(1, c->pack_keys / c->block_k);
  for (int64_t first = j * k_part; first < least((j + 1) * k_part, key_blocks); first += each) {
    int64_t last = least(least(first + each, (j + 1) * k_part), key_blocks), row = first * c->block_k;
    int64_t n = least(last * c->block_k, c->keys) - row, dim = up(c->dim, JD), dim_v = up(c->value_dim, JD);
    pack_visible(c, &c->k, w->k, dim, c->dim, sample, kv_head, row, n);
    pack_visible(c, &c->v, w->v, dim_v, c->value_dim, sample, kv_head, row, n);
    memset(w->dk, 0, (size_t)(n * width_of(c->dim)) * 4);
    memset(w->dv, 0, (size_t)(n * width_of(c->value_dim)) * 4);
    for (int64_t head = kv_head * c->group; head < (kv_head + 1) * c->group; head++)
      backward_super(c, w, sample, head, i * q_part, least((i + 1) * q_part, blocks), first, last);
    backward_scatter(c, w, sample, kv_head, row, 1, n);
  }
}

#endif
