/* Attention over strided and tile plans on CPUs: forward from a running (out, lse), backward from the global lse.
 *
 * A plain C ABI, called through ctypes. Threads are the caller's own team, or live for one call; all memory is taken
 * before anything is written. */
#include <pthread.h>
#include <stdatomic.h>

#include "problem.h"
#include "strided.h"
#include "tiled.h"

#if defined(_WIN32)
#define PUBLIC __declspec(dllexport)
#else
#define PUBLIC __attribute__((visibility("default")))
#endif

/* Under AddressSanitizer the parts of a thread's memory stand apart, with ground between them that must not be read. */
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define GAP 16
#define FENCE(at) __asan_poison_memory_region(at, 4 * GAP)
#else
#define GAP 0
#define FENCE(at) (void)(at)
#endif

#define ABI 3
enum { DONE = 0, NO_MEMORY = 1 };

/* Work memory of one thread, 64-byte aligned parts of one block; 0 when there is none left. */
static int take_work(Work *w, const Problem *c, int is_backward) {
  int64_t d4 = up(c->dim, JD), v4 = up(c->value_dim, JD), pack_rows = c->pack_keys;
  int64_t width = width_of(c->dim), width_v = width_of(c->value_dim);
  memset(w, 0, sizeof *w);
  if (c->is_tiled) {
    int64_t blocks = most(1, c->pack_keys / c->block_k);
    pack_rows = blocks * c->block_k;
    w->slots = blocks;
  }
  int64_t sizes[] = {
      d4 * QB, most(d4, v4) * QB, KB * QB, pack_rows * d4, pack_rows * v4, QB, QB, QB, w->slots * 2,
      c->out_dtype != F32 && !is_backward && !c->is_tiled ? least(c->part_rows, c->queries) * c->value_dim : 0,
      is_backward ? v4 * QB : 0, is_backward ? KB * QB : 0, is_backward ? QB * width : 0,
      is_backward ? QB * width_v : 0, is_backward ? pack_rows * width : 0, is_backward ? pack_rows * width_v : 0,
  };
  float **parts[] = {&w->qt, &w->ot, &w->p, &w->k, &w->v, &w->m, &w->l, (float **)&w->at, (float **)&w->tags,
                     &w->state, &w->gt, &w->s, &w->q, &w->g, &w->dk, &w->dv};
  int64_t total = 0;
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) total += up(sizes[i], 16) + GAP;
  if (posix_memalign((void **)&w->memory, 64, (size_t)total * 4 + 64)) return 0;
  float *next = w->memory;
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    *parts[i] = next;
    next += up(sizes[i], 16) + GAP;
    FENCE(next - GAP);
  }
  w->tag_sample = w->tag_head = -1;
  return 1;
}

typedef void (*Task)(const Problem *c, Work *w, int64_t wave, int64_t task);

typedef struct {
  const Problem *problem;
  Task task;
  int64_t wave, tasks;
  atomic_llong next;
} Wave;

typedef struct {
  Wave *wave;
  Work *work;
} Worker;

static void *work_off(void *argument) {
  Worker *me = argument;
  Wave *wave = me->wave;
  for (;;) {
    int64_t task = atomic_fetch_add(&wave->next, 1);
    if (task >= wave->tasks) return NULL;
    wave->task(wave->problem, me->work, wave->wave, task);
  }
}

/* What the members of a team share: each takes the next worker. */
typedef struct {
  Worker *workers;
  int64_t size;
  atomic_llong next;
} Members;

static void join_work(void *argument) {
  Members *members = argument;
  int64_t i = atomic_fetch_add(&members->next, 1);
  if (i < members->size) work_off(&members->workers[i]);
}

/* All tasks of a wave are done afterwards, by the caller's team, or by as many threads as could be started. */
static void run_wave(const Problem *c, Work *works, Task task, int64_t number, int64_t tasks) {
  Wave wave = {.problem = c, .task = task, .wave = number, .tasks = tasks};
  atomic_init(&wave.next, 0);
  int64_t threads = least(c->threads, tasks), started = 0;
  pthread_t ids[threads > 0 ? threads : 1];
  Worker workers[threads > 0 ? threads : 1];
  for (int64_t i = 0; i < threads; i++) workers[i] = (Worker){&wave, works + i};
  if (c->team && threads > 1) {
    Members members = {.workers = workers, .size = threads};
    atomic_init(&members.next, 0);
    c->team(join_work, &members, (unsigned)threads, 0);
    return;
  }
  while (started + 1 < threads && pthread_create(&ids[started], NULL, work_off, &workers[started + 1]) == 0) started++;
  if (threads > 0) work_off(&workers[0]);
  for (int64_t i = 0; i < started; i++) pthread_join(ids[i], NULL);
}

static void forward_task(const Problem *c, Work *w, int64_t wave, int64_t task) {
  (void)wave;
  if (c->is_tiled) forward_tiled(c, w, task);
  else forward_strided(c, w, task);
}

static void delta_task(const Problem *c, Work *w, int64_t wave, int64_t task) {
  (void)w, (void)wave;
  delta_unit(c, task);
}

static Work *take_works(const Problem *c, int is_backward) {
  Work *works = calloc((size_t)c->threads, sizeof *works);
  for (int64_t i = 0; works && i < c->threads; i++)
    if (!take_work(works + i, c, is_backward)) {
      while (i-- > 0) free(works[i].memory);
      free(works);
      return NULL;
    }
  return works;
}

static void free_works(const Problem *c, Work *works) {
  for (int64_t i = 0; i < c->threads; i++) free(works[i].memory);
  free(works);
}

/* out and lse of every row. */
PUBLIC int da_forward(const Problem *c) {
  int64_t units = c->is_tiled
                      ? ceil_div(ceil_div(c->queries, c->block_q), blocks_per_unit(c)) * c->heads * c->batch
                      : c->first_unit[c->num_chunks];
  Work *works = take_works(c, 0);
  if (!works) return NO_MEMORY;
  run_wave(c, works, forward_task, 0, units);
  free_works(c, works);
  return DONE;
}

/* delta of every row; then this plan's share is added to dq, dk and dv. */
PUBLIC int da_backward(const Problem *c) {
  int64_t bases = c->is_tiled ? c->batch * (c->heads / c->group) : c->first_base[c->num_regions];
  Work *works = take_works(c, 1);
  if (!works) return NO_MEMORY;
  run_wave(c, works, delta_task, 0, ceil_div(c->queries, DELTA_ROWS) * c->heads * c->batch);
  for (int64_t wave = 0; wave < c->parts; wave++)
    run_wave(c, works, c->is_tiled ? backward_tiled : backward_strided, wave, bases * c->parts);
  free_works(c, works);
  return DONE;
}

/* What the caller must agree with: the ABI, the lanes of a vector, and the sizes of the structs. */
PUBLIC void da_layout(int64_t *to) {
  int64_t values[] = {ABI, W, sizeof(Problem), sizeof(Chunk), sizeof(Piece), sizeof(Region)};
  memcpy(to, values, sizeof values);
}

/* 2^x and log2 x of n numbers, as the kernels compute them. */
PUBLIC void da_exp2_log2(const float *x, float *power, float *logarithm, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    vf y = load_row(x, i, n - i, F32);
    store_row(power, i, n - i, F32, exp2v(y));
    store_row(logarithm, i, n - i, F32, log2v(y));
  }
}
