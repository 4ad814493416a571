/* Moving rows: packing keys and values, turning query rows into lanes and back. */
#ifndef DA_ROWS_H
#define DA_ROWS_H

#include "problem.h"

/* n rows of dim numbers, copied to float32 rows of `width` numbers, zeros past dim. */
static void pack(float *to, int64_t width, const char *from, int64_t stride, int64_t n, int64_t dim, int dtype) {
  for (int64_t i = 0; i < n; i++, to += width) {
    const char *row = from + i * stride * item(dtype);
    if (dtype == F32) memcpy(to, row, (size_t)dim * 4);
    else {
      int64_t d = 0;
      for (; d + W <= dim; d += W) storeu(to + d, load_row(row, d, W, dtype));
      if (d < dim) {
        vf x = load_row(row, d, dim - d, dtype);
        memcpy(to + d, &x, (size_t)(dim - d) * 4);
      }
    }
    for (int64_t d = dim; d < width; d++) to[d] = 0;
  }
}

/* n rows times a factor as columns of t (dim, QB); lanes from n to `lanes` are 0. */
static void load_lanes(float *t, const char *rows, int64_t stride, int64_t n, int64_t lanes, int64_t dim, int dtype,
                       float factor) {
  for (int64_t x = 0; x < lanes; x += W)
    for (int64_t d = 0; d < dim; d += W) {
      vf r[W];
      for (int i = 0; i < W; i++)
        r[i] = x + i < n ? load_row(rows, (x + i) * stride + d, dim - d, dtype) * factor : (vf){0};
      transpose(r);
      for (int i = 0; i < W && d + i < dim; i++) store(t + (d + i) * QB + x, r[i]);
    }
}

/* Columns of t (dim, QB), each lane times its factor, written to n rows, or added to float32 rows. */
static void store_lanes(const float *t, const float *factor, char *rows, int64_t stride, int64_t n, int64_t dim,
                        int dtype, int add) {
  for (int64_t x = 0; x < n; x += W)
    for (int64_t d = 0; d < dim; d += W) {
      vf r[W], f = load(factor + x);
      for (int i = 0; i < W; i++) r[i] = d + i < dim ? load(t + (d + i) * QB + x) * f : (vf){0};
      transpose(r);
      for (int i = 0; i < W && x + i < n; i++) {
        int64_t at = (x + i) * stride + d;
        store_row(rows, at, dim - d, dtype, add ? r[i] + load_row(rows, at, dim - d, dtype) : r[i]);
      }
    }
}

/* Lanes to compute for n rows: one vector, or whole groups. */
INLINE int64_t lanes_of(int64_t n) { return n <= W ? W : up(n, U * W); }

/* How often W lanes from lane x on see key j. */
INLINE vi counts_at(const Rule *r, int64_t j, int64_t x) {
  const uint8_t *at = r->counts + j * r->count_row + x * r->count_size;
  if (r->count_size == 1) {
    vb c;
    memcpy(&c, at, sizeof c);
    return __builtin_convertvector(c, vi);
  }
  vi c;
  memcpy(&c, at, sizeof c);
  return c;
}

/* The row's logits in lanes [0, n) change by the rule; nothing is left of hidden ones. `p` is (keys, QB). */
static void apply_rule(const Rule *r, float *p, int64_t keys, int64_t lanes) {
  vi lane0;
  for (int i = 0; i < W; i++) lane0[i] = -i;
  for (int64_t j = 0; j < keys; j++) {
    int32_t low = (int32_t)most(least(r->low - j, QB), -2 * QB), high = (int32_t)least(most(r->high - j, -2 * QB), QB);
    for (int64_t x = 0; x < lanes; x += W) {
      vf s = load(p + j * QB + x) + r->add;
      if (r->q_at) {
        vi q_at;
        memcpy(&q_at, r->q_at + x, sizeof q_at);
        vi apart = q_at - r->k_at[j * r->k_step];
        if (r->table)
          for (int i = 0; i < W; i++) s[i] += r->table[most(least(apart[i], r->reach), -r->reach)];
        else s -= __builtin_convertvector((apart ^ (apart >> 31)) - (apart >> 31), vf) * r->slope;
      }
      vi behind = lane0 - (int32_t)x, seen = (vi)(behind >= low) & (vi)(behind <= high);
      if (r->counts) seen &= (vi)(counts_at(r, j, x) > 0);
      store(p + j * QB + x, choose(seen, s, all(-INFINITY)));
    }
  }
}

/* Weights times the counts of their pairs. */
static void apply_counts(const Rule *r, float *p, int64_t keys, int64_t lanes) {
  for (int64_t j = 0; j < keys; j++)
    for (int64_t x = 0; x < lanes; x += W)
      store(p + j * QB + x, load(p + j * QB + x) * __builtin_convertvector(counts_at(r, j, x), vf));
}

/* Whether the rule leaves this block of keys as it is, for lanes below n. */
INLINE int is_plain(const Rule *r, int64_t keys, int64_t n) {
  return !r->q_at && !r->counts && r->add == 0 && r->low <= 1 - n && r->high >= keys - 1;
}

/* The rule for the keys from the j-th on. */
INLINE Rule rule_from(const Rule *r, int64_t j) {
  Rule later = *r;
  later.low -= j;
  later.high -= j;
  if (r->counts) later.counts += j * r->count_row;
  if (r->k_at) later.k_at += j * r->k_step;
  return later;
}

#endif
