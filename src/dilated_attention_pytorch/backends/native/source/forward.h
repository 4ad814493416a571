/* The forward key loop: a tile of queries in lanes against packed keys and values.
 *
 * Queries lie transposed, so maxima and sums over keys are vertical and a key is a broadcast. */
#ifndef DA_FORWARD_H
#define DA_FORWARD_H

#include "rows.h"

#define JS 6 /* keys by U vectors held in registers */
#define JD 4 /* value columns by U vectors */

/* Logits of J keys for V vectors of lanes; the running maximum follows when `top` is given. */
INLINE void logits_block(const float *qt, int64_t dim, const float *k, int64_t stride, float *p, const float *minus,
                         vf *top, const int J, const int V) {
  vf a[JS][U];
  for (int j = 0; j < J; j++)
    for (int u = 0; u < V; u++) a[j][u] = minus ? -load(minus + u * W) : (vf){0};
  for (int64_t d = 0; d < dim; d++) {
    vf q[U];
    for (int u = 0; u < V; u++) q[u] = load(qt + d * QB + u * W);
    for (int j = 0; j < J; j++)
      for (int u = 0; u < V; u++) a[j][u] += k[j * stride + d] * q[u];
  }
  for (int j = 0; j < J; j++)
    for (int u = 0; u < V; u++) {
      store(p + j * QB + u * W, a[j][u]);
      if (top) top[u] = maximum(top[u], a[j][u]);
    }
}

#define TAIL(left, CALL) \
  switch (left) {        \
    case 5: CALL(5); break; \
    case 4: CALL(4); break; \
    case 3: CALL(3); break; \
    case 2: CALL(2); break; \
    case 1: CALL(1); break; \
    default: break;      \
  }

/* Logits of all keys of a block, less `minus` (QB) when given, for `lanes` lanes. */
static void logits(const float *qt, int64_t dim, const float *k, int64_t stride, int64_t keys, float *p,
                   const float *minus, vf *top, int64_t lanes) {
  for (int64_t j = 0; j < keys; j += JS, k += JS * stride, p += JS * QB) {
    int left = (int)least(keys - j, JS);
    if (lanes == W) {
#define ONE(J) logits_block(qt, dim, k, stride, p, minus, top, J, 1)
      if (left == JS) ONE(JS);
      else TAIL(left, ONE)
#undef ONE
      continue;
    }
    for (int64_t x = 0; x < lanes; x += U * W) {
      const float *less = minus ? minus + x : NULL;
      vf *peak = top ? top + x / W : NULL;
#define GROUP(J) logits_block(qt + x, dim, k, stride, p + x, less, peak, J, U)
      if (left == JS) GROUP(JS);
      else TAIL(left, GROUP)
#undef GROUP
    }
  }
}

/* t = t * alpha + the sum over keys of rows[key][d] * p[key], for JD columns d and V vectors of lanes. */
INLINE void weighted_block(float *t, const float *rows, int64_t stride, const float *p, int64_t keys, const vf *alpha,
                           const int V) {
  vf a[JD][U];
  for (int d = 0; d < JD; d++)
    for (int u = 0; u < V; u++) a[d][u] = (vf){0};
  for (int64_t j = 0; j < keys; j++) {
    vf w[U];
    for (int u = 0; u < V; u++) w[u] = load(p + j * QB + u * W);
    for (int d = 0; d < JD; d++)
      for (int u = 0; u < V; u++) a[d][u] += rows[j * stride + d] * w[u];
  }
  for (int d = 0; d < JD; d++)
    for (int u = 0; u < V; u++) {
      float *at = t + d * QB + u * W;
      store(at, alpha ? load(at) * alpha[u] + a[d][u] : load(at) + a[d][u]);
    }
}

/* The same for all columns; `dim` is a multiple of JD and rows are padded to it. */
static void weighted(float *t, int64_t dim, const float *rows, int64_t stride, const float *p, int64_t keys,
                     const vf *alpha, int64_t lanes) {
  for (int64_t d = 0; d < dim; d += JD) {
    if (lanes == W) weighted_block(t + d * QB, rows + d, stride, p, keys, alpha, 1);
    else
      for (int64_t x = 0; x < lanes; x += U * W)
        weighted_block(t + d * QB + x, rows + d, stride, p + x, keys, alpha ? alpha + x / W : NULL, U);
  }
}

/* One block of at most KB keys joins the running (maximum, sum, weighted values). */
static void forward_block(Work *w, int64_t dim, int64_t dim_v, const float *k, int64_t k_stride, const float *v,
                          int64_t v_stride, int64_t keys, const Rule *rule, int64_t n) {
  int64_t lanes = lanes_of(n), vectors = lanes / W;
  int plain = is_plain(rule, keys, n);
  vf top[QB / W], alpha[QB / W];
  for (int64_t u = 0; u < vectors; u++) top[u] = load(w->m + u * W);
  logits(w->qt, dim, k, k_stride, keys, w->p, NULL, plain ? top : NULL, lanes);
  if (!plain) {
    apply_rule(rule, w->p, keys, lanes);
    for (int64_t j = 0; j < keys; j++)
      for (int64_t u = 0; u < vectors; u++) top[u] = maximum(top[u], load(w->p + j * QB + u * W));
  }
  for (int64_t u = 0; u < vectors; u++) {
    vf peak = top[u];
    for (int64_t j = 0; j < keys; j++) {
      float *p = w->p + j * QB + u * W;
      store(p, exp2v(load(p) - peak));
    }
    alpha[u] = exp2v(load(w->m + u * W) - peak);
    store(w->m + u * W, peak);
  }
  if (rule->counts) apply_counts(rule, w->p, keys, lanes);
  for (int64_t u = 0; u < vectors; u++) {
    vf sum[4] = {{0}, {0}, {0}, {0}};
    int64_t j = 0;
    for (; j + 4 <= keys; j += 4)
      for (int i = 0; i < 4; i++) sum[i] += load(w->p + (j + i) * QB + u * W);
    for (; j < keys; j++) sum[0] += load(w->p + j * QB + u * W);
    float *l = w->l + u * W;
    store(l, load(l) * alpha[u] + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
  weighted(w->ot, dim_v, v, v_stride, w->p, keys, alpha, lanes);
}

/* Any number of keys, in blocks of nearly equal size. */
static void forward_run(Work *w, int64_t dim, int64_t dim_v, const float *k, int64_t k_stride, const float *v,
                        int64_t v_stride, int64_t keys, const Rule *rule, int64_t n) {
  int64_t blocks = ceil_div(keys, KB), size = least(up(ceil_div(keys, most(blocks, 1)), JS), KB);
  for (int64_t j = 0; j < keys; j += size) {
    Rule here = rule_from(rule, j);
    forward_block(w, dim, dim_v, k + j * k_stride, k_stride, v + j * v_stride, v_stride, least(size, keys - j), &here,
                  n);
  }
}

/* Keys whose rule hides some pairs only near its bounds: full blocks run without it. */
static void forward_keys(Work *w, int64_t dim, int64_t dim_v, const float *k, int64_t k_stride, const float *v,
                         int64_t v_stride, int64_t keys, const Rule *rule, int64_t n) {
  int64_t first = least(most(rule->low + n - 1, 0), keys), last = most(least(rule->high + 1, keys), 0);
  if (first >= last) first = last = 0;
  int64_t cuts[4] = {0, first, last, keys};
  for (int i = 0; i < 3; i++) {
    int64_t j = cuts[i];
    Rule here = rule_from(rule, j);
    forward_run(w, dim, dim_v, k + j * k_stride, k_stride, v + j * v_stride, v_stride, cuts[i + 1] - j, &here, n);
  }
}

/* A tile that has seen nothing yet. */
static void start_empty(Work *w, int64_t dim_v, int64_t lanes) {
  for (int64_t d = 0; d < dim_v; d++) memset(w->ot + d * QB, 0, (size_t)lanes * 4);
  for (int64_t x = 0; x < lanes; x++) w->m[x] = LOWEST, w->l[x] = 0;
}

/* A tile that goes on from stored float32 rows of out and their lse. */
static void start_stored(Work *w, int64_t dim_v, const char *rows, int64_t stride, const float *lse, int64_t lse_stride,
                         int64_t n, int64_t value_dim) {
  int64_t lanes = lanes_of(n);
  load_lanes(w->ot, rows, stride, n, lanes, value_dim, F32, 1.0f);
  for (int64_t d = value_dim; d < dim_v; d++) memset(w->ot + d * QB, 0, (size_t)lanes * 4);
  for (int64_t x = 0; x < lanes; x++) {
    float past = x < n ? lse[x * lse_stride] : -INFINITY;
    w->m[x] = past == -INFINITY ? LOWEST : past * LOG2E;
    w->l[x] = past == -INFINITY ? 0 : 1;
  }
}

/* Out and lse of n rows; rows that saw no key get 0 and -inf. */
static void finish(Work *w, char *rows, int64_t stride, int dtype, float *lse, int64_t lse_stride, int64_t n,
                   int64_t value_dim) {
  __attribute__((aligned(64))) float result[QB];
  for (int64_t x = 0; x < n; x += W) {
    vf l = load(w->l + x), m = load(w->m + x);
    vi unseen = (vi)(l == 0.0f);
    vf row = m * LN2 + log2v(l) * LN2; /* not (m + log2 l) * LN2: base 2 has larger numbers, and their roundings */
    row += l - l;                      /* NaN where the sum is no number */
    store(result + x, choose(unseen, all(-INFINITY), row));
    store(w->l + x, choose(unseen, (vf){0}, 1.0f / l));
  }
  store_lanes(w->ot, w->l, rows, stride, n, value_dim, dtype, 0);
  for (int64_t x = 0; x < n; x++) lse[x * lse_stride] = result[x];
}

#endif
