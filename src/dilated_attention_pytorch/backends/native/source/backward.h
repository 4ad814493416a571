/* The backward key loop, from the global lse: P = exp(s - lse), dS = P (dP - delta), one tile of queries at a time.
 *
 * Logits, dP and dq have queries in lanes, as forward; dk and dv have columns in lanes. */
#ifndef DA_BACKWARD_H
#define DA_BACKWARD_H

#include "forward.h"

/* Columns of dk and dv held in registers: vectors by keys. */
#if U == 4
#define COLUMNS 4
#else
#define COLUMNS 2
#endif

INLINE int64_t width_of(int64_t dim) { return up(dim, W); }

/* s = (dP - delta) * p for J keys and V vectors of lanes. */
INLINE void gradient_block(const float *gt, int64_t dim, const float *v, int64_t stride, const float *p, float *s,
                           const float *delta, const int J, const int V) {
  vf a[JS][U];
  for (int j = 0; j < J; j++)
    for (int u = 0; u < V; u++) a[j][u] = -load(delta + u * W);
  for (int64_t d = 0; d < dim; d++) {
    vf g[U];
    for (int u = 0; u < V; u++) g[u] = load(gt + d * QB + u * W);
    for (int j = 0; j < J; j++)
      for (int u = 0; u < V; u++) a[j][u] += v[j * stride + d] * g[u];
  }
  for (int j = 0; j < J; j++)
    for (int u = 0; u < V; u++) store(s + j * QB + u * W, a[j][u] * load(p + j * QB + u * W));
}

static void gradients(const float *gt, int64_t dim, const float *v, int64_t stride, int64_t keys, const float *p,
                      float *s, const float *delta, int64_t lanes) {
  for (int64_t j = 0; j < keys; j += JS, v += JS * stride, p += JS * QB, s += JS * QB) {
    int left = (int)least(keys - j, JS);
    if (lanes == W) {
#define ONE(J) gradient_block(gt, dim, v, stride, p, s, delta, J, 1)
      if (left == JS) ONE(JS);
      else TAIL(left, ONE)
#undef ONE
      continue;
    }
    for (int64_t x = 0; x < lanes; x += U * W) {
#define GROUP(J) gradient_block(gt + x, dim, v, stride, p + x, s + x, delta + x, J, U)
      if (left == JS) GROUP(JS);
      else TAIL(left, GROUP)
#undef GROUP
    }
  }
}

/* to[key][columns] += the sum over lanes of p[key][lane] * rows[lane][columns], for J keys and C vectors of columns. */
INLINE void outer_block(float *to, int64_t width, const float *p, const float *rows, int64_t n, const int J,
                        const int C) {
  vf a[12][COLUMNS];
  for (int j = 0; j < J; j++)
    for (int c = 0; c < C; c++) a[j][c] = load(to + j * width + c * W);
  for (int64_t i = 0; i < n; i++) {
    vf r[COLUMNS];
    for (int c = 0; c < C; c++) r[c] = load(rows + i * width + c * W);
    for (int j = 0; j < J; j++)
      for (int c = 0; c < C; c++) a[j][c] += p[j * QB + i] * r[c];
  }
  for (int j = 0; j < J; j++)
    for (int c = 0; c < C; c++) store(to + j * width + c * W, a[j][c]);
}

#define OUTER_COLUMNS(J, C)                                                                              \
  {                                                                                                      \
    int64_t j = 0;                                                                                       \
    for (; j + (J) <= keys; j += (J)) outer_block(to + j * width, width, p + j * QB, rows, n, J, C);     \
    for (; j + 2 <= keys; j += 2) outer_block(to + j * width, width, p + j * QB, rows, n, 2, C);         \
    if (j < keys) outer_block(to + j * width, width, p + j * QB, rows, n, 1, C);                         \
  }

/* The same for all keys and columns; `width` is a multiple of W. */
static void outer(float *to, int64_t width, const float *p, const float *rows, int64_t keys, int64_t n) {
  for (int64_t left = width / W; left > 0;) {
#if COLUMNS == 4
    int columns = left == 5 ? 3 : (int)least(left, 4); /* 3 + 2 rather than 4 + 1 */
    if (columns == 4) OUTER_COLUMNS(6, 4)
    else if (columns == 3) OUTER_COLUMNS(8, 3)
    else if (columns == 2) OUTER_COLUMNS(12, 2)
    else OUTER_COLUMNS(12, 1)
#else
    int columns = (int)least(left, 2);
    if (columns == 2) OUTER_COLUMNS(6, 2)
    else OUTER_COLUMNS(8, 1)
#endif
    to += columns * W;
    rows += columns * W;
    left -= columns;
  }
}

/* Keys and values of a run of rows, packed; their gradients start at 0. */
static void backward_pack(const Problem *c, Work *w, const char *k, int64_t k_stride, const char *v, int64_t v_stride,
                          int64_t n) {
  pack(w->k, up(c->dim, JD), k, k_stride, n, c->dim, (int)c->dtype);
  pack(w->v, up(c->value_dim, JD), v, v_stride, n, c->value_dim, (int)c->dtype);
  memset(w->dk, 0, (size_t)(n * width_of(c->dim)) * 4);
  memset(w->dv, 0, (size_t)(n * width_of(c->value_dim)) * 4);
}

/* A tile of n query rows `step` apart, with dout, lse and delta; lanes past n have weight 0. */
static void backward_start(const Problem *c, Work *w, int64_t sample, int64_t head, int64_t row, int64_t step,
                           int64_t n) {
  int64_t size = item(c->dtype), lanes = lanes_of(n);
  const char *q = at_row(&c->q, size, sample, row, head), *g = at_row(&c->dout, size, sample, row, head);
  const float *lse = (const float *)at_row(&c->lse, 4, sample, row, head);
  const float *delta = (const float *)at_row(&c->delta, 4, sample, row, head);
  int dtype = (int)c->dtype;
  load_lanes(w->qt, q, c->q.token * step, n, lanes, c->dim, dtype, (float)(c->scale * LOG2E));
  load_lanes(w->gt, g, c->dout.token * step, n, lanes, c->value_dim, dtype, 1.0f);
  pack(w->q, width_of(c->dim), q, c->q.token * step, n, c->dim, dtype);
  pack(w->g, width_of(c->value_dim), g, c->dout.token * step, n, c->value_dim, dtype);
  for (int64_t d = 0; d < up(c->dim, JD); d++) memset(w->ot + d * QB, 0, (size_t)lanes * 4);
  for (int64_t x = 0; x < lanes; x++) {
    float row_lse = x < n ? lse[x * step * c->lse.token] : -INFINITY;
    w->m[x] = row_lse == -INFINITY ? INFINITY : row_lse * LOG2E; /* exp2(s - inf) is 0 */
    w->l[x] = x < n ? delta[x * step * c->delta.token] : 0;
  }
}

/* `keys` packed keys from the y-th on join dq of the tile and get their dk and dv. */
static void backward_keys(const Problem *c, Work *w, int64_t y, int64_t keys, const Rule *rule, int64_t n) {
  int64_t dim = up(c->dim, JD), dim_v = up(c->value_dim, JD), lanes = lanes_of(n);
  int64_t width = width_of(c->dim), width_v = width_of(c->value_dim);
  for (int64_t j = 0; j < keys;) {
    int64_t size = least(KB, keys - j);
    Rule here = rule_from(rule, j);
    const float *k = w->k + (y + j) * dim, *v = w->v + (y + j) * dim_v;
    logits(w->qt, c->dim, k, dim, size, w->p, w->m, NULL, lanes);
    int plain = is_plain(&here, size, n);
    if (!plain) apply_rule(&here, w->p, size, lanes);
    for (int64_t i = 0; i < size; i++)
      for (int64_t x = 0; x < lanes; x += W) store(w->p + i * QB + x, exp2v(load(w->p + i * QB + x)));
    if (here.counts) apply_counts(&here, w->p, size, lanes);
    gradients(w->gt, c->value_dim, v, dim_v, size, w->p, w->s, w->l, lanes);
    weighted(w->ot, dim, k, dim, w->s, size, NULL, lanes);
    outer(w->dk + (y + j) * width, width, w->s, w->q, size, n);
    outer(w->dv + (y + j) * width_v, width_v, w->p, w->g, size, n);
    j += size;
  }
}

/* dq of the tile is added to its rows. */
static void backward_finish(const Problem *c, Work *w, int64_t sample, int64_t head, int64_t row, int64_t step,
                            int64_t n) {
  for (int64_t x = 0; x < up(n, W); x++) w->l[x] = (float)c->scale;
  store_lanes(w->ot, w->l, at_row(&c->dq, 4, sample, row, head), c->dq.token * step, n, c->dim, F32, 1);
}

/* dk and dv of a packed run of n key rows `step` apart are added to their rows. */
static void backward_scatter(const Problem *c, const Work *w, int64_t sample, int64_t kv_head, int64_t row,
                             int64_t step, int64_t n) {
  char *dk = at_row(&c->dk, 4, sample, row, kv_head), *dv = at_row(&c->dv, 4, sample, row, kv_head);
  for (int64_t i = 0; i < n; i++) {
    const float *from_k = w->dk + i * width_of(c->dim), *from_v = w->dv + i * width_of(c->value_dim);
    float *to_k = (float *)dk + i * step * c->dk.token, *to_v = (float *)dv + i * step * c->dv.token;
    for (int64_t d = 0; d < c->dim; d++) to_k[d] += (float)c->scale * from_k[d];
    for (int64_t d = 0; d < c->value_dim; d++) to_v[d] += from_v[d];
  }
}

#define DELTA_ROWS 256

/* delta = <dout, out> - dlse for some rows of one sample and head. */
static void delta_unit(const Problem *c, int64_t unit) {
  int64_t blocks = ceil_div(c->queries, DELTA_ROWS), block = unit % blocks;
  int64_t head = unit / blocks % c->heads, sample = unit / (blocks * c->heads);
  int dtype = (int)c->dtype, out_dtype = (int)c->out_dtype;
  for (int64_t row = block * DELTA_ROWS; row < least((block + 1) * DELTA_ROWS, c->queries); row++) {
    const char *o = at_row(&c->out, item(out_dtype), sample, row, head);
    const char *g = at_row(&c->dout, item(dtype), sample, row, head);
    vf sum = {0};
    for (int64_t d = 0; d < c->value_dim; d += W)
      sum += load_row(o, d, c->value_dim - d, out_dtype) * load_row(g, d, c->value_dim - d, dtype);
    float total = c->dlse.data ? -*(const float *)at_row(&c->dlse, 4, sample, row, head) : 0;
    for (int i = 0; i < W; i++) total += sum[i];
    *(float *)at_row(&c->delta, 4, sample, row, head) = total;
  }
}

#endif
