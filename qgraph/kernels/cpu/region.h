/* What Python hands to the engine of regions on CPUs: plain data, no code.
 *
 * A region is a table of buffers and a list of steps.  A step is a kind of work and its arguments;
 * the engine cuts it into tasks that threads take in any order.  Steps up to the next QG_BARRIER
 * make a phase: they run at the same time, so none may read what another of them writes.
 *
 * Every struct is a multiple of 8 bytes without padding of the compiler's; `args` of a step is the
 * offset of its struct in `region.args`, a multiple of 8.  Lengths and strides are in elements,
 * offsets in bytes.  Whatever is said here is checked when a region is made: a mistake is an error
 * with words, not a crash.  A number that only the run knows (a position, an index) is brought into
 * its range.
 */
#ifndef QGRAPH_REGION_H
#define QGRAPH_REGION_H
#include <stdint.h>

#define QG_VERSION 2
#define QG_RANK 8

/* ---- Buffers and operands ------------------------------------------------------------------- */

enum qg_dtype {
  QG_BOOL, QG_U8, QG_U16, QG_U32, QG_U64, QG_I8, QG_I16, QG_I32, QG_I64, QG_F16, QG_BF16, QG_F32,
};

enum qg_memory {
  QG_GIVEN,   /* place: number of the pointer handed to each run (inputs, outputs, caches) */
  QG_FIXED,   /* place: an address that stays good as long as the region (weights) */
  QG_ARENA,   /* place: offset in the region's arena, a multiple of 64; planned by life time */
  QG_PRIVATE, /* place: offset in an arena that each thread has of its own, a multiple of 64 */
};

typedef struct {
  int32_t memory, reserved;
  int64_t place;
  int64_t bytes;
} qg_buffer;

/* A first element.  `buffer` -1: the operand is left out. */
typedef struct {
  int32_t buffer, dtype;
  int64_t offset; /* bytes */
} qg_ref;

/* An array of any strides (0 to broadcast, negative to flip). */
typedef struct {
  qg_ref at;
  int64_t rank, shape[QG_RANK], strides[QG_RANK];
} qg_view;

/* An integer that moves a view's first element along an axis when the step runs.  `index` absent:
 * none.  The start is brought into 0 … limit. */
typedef struct {
  qg_ref index; /* one integer */
  int64_t stride, limit;
} qg_start;

/* ---- Steps ---------------------------------------------------------------------------------- */

enum qg_flag {
  QG_BARRIER = 1,     /* what stands before is done before this begins */
  QG_EACH_THREAD = 2, /* every thread that takes part in the phase does the whole step, before any
                         task; it writes QG_PRIVATE buffers only, which steps of this phase read */
};

typedef struct {
  int32_t kind, flags;
  int64_t args;
} qg_step;

enum qg_kind {
  QG_ELEMENTWISE, QG_MATMUL, QG_ATTENTION, QG_NORM, QG_ROPE, QG_SOFTMAX, QG_REDUCE, QG_SCAN,
  QG_COPY, QG_TAKE, QG_SORT, QG_JUMP, QG_TAKE_ALONG,
  QG_RANDOM, QG_SCATTER,
  QG_KINDS,
};

/* A chain of elementwise operations in one pass: values are numbered, first the inputs, then what
 * each instruction gives.  Half precision is computed in float32 and rounded after each. */
typedef struct {
  qg_ref at;
  int64_t strides[QG_RANK];
} qg_operand;

typedef struct {
  int32_t op, dtype; /* dtype: of the operands; for QG_OP_CAST and QG_OP_CONST, _IOTA of the result */
  int32_t a, b, c;   /* numbers of values */
  int32_t reserved;
  union {
    double real;     /* QG_OP_CONST of a float dtype */
    int64_t integer; /* QG_OP_CONST of another; QG_OP_IOTA: the axis counted along */
  } value;
} qg_instruction;

typedef struct {
  int64_t rank, shape[QG_RANK];
  int64_t inputs, instructions, outputs;      /* how many */
  int64_t input_at, instruction_at, output_at; /* offsets in args: qg_operand[], qg_instruction[], qg_output[] */
} qg_elementwise;

typedef struct {
  qg_operand to;
  int64_t value; /* its number; its dtype is that of `to` */
} qg_output;

/* As the functions of mlx.core are named.  Comparisons and is… give bool, all else the dtype of the
 * operands.  Integer divide: floor_divide and remainder only. */
enum qg_op {
  QG_OP_CONST, QG_OP_IOTA, QG_OP_CAST, QG_OP_BITCAST, QG_OP_WHERE, /* where: a is bool */
  QG_OP_ADD, QG_OP_SUBTRACT, QG_OP_MULTIPLY, QG_OP_DIVIDE, QG_OP_MAXIMUM, QG_OP_MINIMUM,
  QG_OP_POWER, QG_OP_REMAINDER, QG_OP_FLOOR_DIVIDE, QG_OP_ARCTAN2, QG_OP_LOGADDEXP,
  QG_OP_EQUAL, QG_OP_NOT_EQUAL, QG_OP_LESS, QG_OP_LESS_EQUAL, QG_OP_GREATER, QG_OP_GREATER_EQUAL,
  QG_OP_LOGICAL_AND, QG_OP_LOGICAL_OR, QG_OP_LOGICAL_NOT, /* of bool */
  QG_OP_BITWISE_AND, QG_OP_BITWISE_OR, QG_OP_BITWISE_XOR, QG_OP_BITWISE_INVERT, QG_OP_LEFT_SHIFT,
  QG_OP_RIGHT_SHIFT,
  QG_OP_ABS, QG_OP_NEGATIVE, QG_OP_SIGN, QG_OP_SQUARE, QG_OP_RECIPROCAL, QG_OP_SQRT, QG_OP_RSQRT,
  QG_OP_EXP, QG_OP_EXPM1, QG_OP_LOG, QG_OP_LOG2, QG_OP_LOG10, QG_OP_LOG1P, QG_OP_SIGMOID,
  QG_OP_TANH, QG_OP_ERF, QG_OP_ERFINV, QG_OP_SIN, QG_OP_COS, QG_OP_TAN, QG_OP_SINH, QG_OP_COSH,
  QG_OP_ARCSIN, QG_OP_ARCCOS, QG_OP_ARCTAN, QG_OP_ARCSINH, QG_OP_ARCCOSH, QG_OP_ARCTANH,
  QG_OP_FLOOR, QG_OP_CEIL, QG_OP_ROUND, QG_OP_TRUNC, QG_OP_ISNAN, QG_OP_ISINF, QG_OP_ISFINITE,
  QG_OP_ISPOSINF, QG_OP_ISNEGINF,
  QG_OP_FMA, /* a * b + c, rounded once */
  QG_OP_SILU, QG_OP_GELU, QG_OP_GELU_TANH, QG_OP_RELU, /* computed in float32, rounded once */
  QG_OPS,
};

/* y (m, n) = x (m, k) by w (n, k) transposed, for each matrix of a batch.
 *
 * Then, each only where given, and rounded to y's dtype in between: times alpha; plus bias; the
 * activation; times the product with w2 (gate and up of a gated layer); times `times`; plus `add`.
 * Sums run in float32.  A packed w is (n, k) of codes as mx.quantize packs them, its rows whole; a
 * stack of matrices follows without gaps, and batch strides of w count matrices then. */
enum qg_mode { QG_DENSE, QG_AFFINE, QG_MXFP4, QG_MXFP8, QG_NVFP4 };
enum qg_activation {
  QG_IDENTITY, QG_SILU, QG_GELU, QG_GELU_TANH, QG_RELU, QG_SIGMOID, QG_TANH,
};

typedef struct {
  qg_ref codes, scales, biases; /* codes: the numbers themselves if dense; biases: of affine */
} qg_weight;

typedef struct {
  qg_ref x, y;
  qg_weight w, w2;
  int64_t mode, bits, group;
  int64_t columns_first; /* 1: a packed w is (k, n), its groups along n: mx's transpose=False */
  int64_t rounded; /* 1: x is first rounded to affine codes of 8 bits in groups of 32 along k; for an
                      affine w of 4 or 8 bits whose groups run along k, without batches */
  int64_t m, n, k;
  int64_t x_row, x_column, y_row, y_column;
  int64_t w_row, w_column; /* of a dense w: from n to n + 1, from k to k + 1 */
  qg_ref bias, times, add; /* bias (n,) without gaps; times and add like y, of y's dtype */
  int64_t times_row, add_row; /* their columns lie side by side */
  double alpha;
  int64_t activation;
  int64_t batch_rank, batch[4], x_batch[4], w_batch[4], y_batch[4], times_batch[4], add_batch[4];
  qg_ref lhs, rhs; /* 32-bit integers, one for each of the batch in order, without gaps: which
                      matrix of x (each x_stack apart) and of w (each w_stack) it takes */
  int64_t x_stack, x_matrices, w_stack, w_matrices;
} qg_matmul;

/* softmax(scale q k^T + mask) v; q (batch, heads, queries, dim), k (batch, kv_heads, keys, dim),
 * v (…, value_dim); kv_heads divides heads.  Caches may be of another float dtype than q. */
typedef struct {
  qg_ref q, k, v, y;
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;
  int64_t q_strides[4], k_strides[4], v_strides[4], y_strides[4];
  double scale;
  int64_t causal; /* key j is seen by query i if j <= i + keys - queries; or, with `last`, by
                     query i if j <= last + i - (queries - 1) */
  int64_t window; /* of the seen keys only the last `window`; 0: all.  Wants causal or last. */
  qg_ref last;    /* integer: keys beyond it are not read.  Below 0 all hidden: all weigh the same */
  int64_t last_batch; /* its stride from batch to batch: 0, or 1 */
  qg_ref first;       /* integer: keys before it are hidden (rows padded on the left) */
  int64_t first_batch;
  qg_ref mask; /* bool (False hides) or a float dtype (added) */
  int64_t mask_strides[4]; /* batch, heads, queries, keys */
  qg_ref sinks;            /* (heads,): a score that takes part in the sum alone */
} qg_attention;

typedef struct {
  qg_ref x, y, weight, bias; /* weight, bias (columns,) or absent */
  int64_t layer;             /* 0: rms_norm, 1: layer_norm */
  int64_t rows, columns, x_row, x_column, y_row, y_column;
  double eps;
} qg_norm;

/* mx.fast.rope of x (batch, heads, length, dim).  Elements from `dims` on are copied. */
typedef struct {
  qg_ref x, y, freqs, offset; /* freqs (dims / 2,) float32, else base; offset: integer */
  int64_t batch, heads, length, dim, dims, traditional;
  int64_t x_strides[4], y_strides[4];
  int64_t offset_batch; /* stride of offset: 0, or 1 for one a batch */
  int64_t start;        /* added to offset, or alone without it */
  double base, scale;
} qg_rope;

/* Rows of any number of axes and one axis that the work runs along. */
typedef struct {
  qg_ref x, y;
  int64_t rank, shape[QG_RANK], x_strides[QG_RANK], y_strides[QG_RANK];
  int64_t length, x_axis, y_axis;
} qg_rows;

typedef struct {
  qg_rows rows;
} qg_softmax;

enum qg_reduction {
  QG_SUM, QG_MEAN, QG_PROD, QG_MAX, QG_MIN, QG_ALL, QG_ANY, QG_ARGMAX, QG_ARGMIN, QG_LOGSUMEXP,
  QG_VAR,
  QG_SET, /* of a scatter: no reduction, the last one stays */
};

/* y over the outer axes; x over the outer and then the inner ones, which are reduced.  argmax and
 * argmin give uint32, the number in the order of the inner axes, the first of equal ones. */
typedef struct {
  qg_ref x, y;
  int64_t op, outer_rank, inner_rank;
  int64_t outer[QG_RANK], x_outer[QG_RANK], y_outer[QG_RANK], inner[QG_RANK], x_inner[QG_RANK];
  double ddof; /* of QG_VAR */
} qg_reduce;

typedef struct {
  qg_rows rows;
  int64_t op; /* QG_SUM, QG_PROD, QG_MAX, QG_MIN, QG_LOGSUMEXP (logcumsumexp) */
  int64_t reverse, exclusive;
} qg_scan;

/* y[…] = x[…], of one shape and of dtypes of one size: any view made an array, a part of a
 * concatenation, slice and slice_update at positions that are arrays. */
typedef struct {
  qg_view x, y;
  qg_start x_starts[QG_RANK], y_starts[QG_RANK];
} qg_copy;

/* y (outer, count, inner) = x (outer, length, inner) at indices along the middle axis, counted from
 * the end if negative.  A packed x is (length, inner) of codes: rows are dequantized (outer 1). */
typedef struct {
  qg_ref x, y, scales, biases, indices; /* all without gaps, indices of any integer dtype */
  int64_t outer, length, inner, count;
  int64_t mode, bits, group;
} qg_take;

typedef struct {
  qg_rows rows;     /* y: like x, or uint32 if `arguments` */
  int64_t arguments; /* 1: argsort.  Both stable, NaN last. */
  int64_t kept;      /* how many are written; 0: all */
  int64_t part, at;  /* part 1: only element `at` where it would be in order, what is before it not
                        behind and what is behind not before */
} qg_sort;

/* Goes to step `target` if the one integer or bool at `if_zero` is zero (absent: always).  What is
 * before a jump, and before its target, is done first. */
typedef struct {
  qg_ref if_zero;
  int64_t target;
} qg_jump;

/* y[row, i] = x[row, indices[row, i]], or, with `put`, y[row, indices[row, i]] = x[row, i];
 * rows.length: how many i there are. */
typedef struct {
  qg_rows rows;
  qg_ref indices;
  int64_t index_strides[QG_RANK], index_axis;
  int64_t x_length, y_length; /* of the axis; that of y only with `put` */
  int64_t put;
} qg_take_along;

/* y[row + offsets[i]] = op(that, x[row, i]) for i in order: of QG_SUM, QG_PROD, QG_MAX, QG_MIN and
 * QG_SET.  Offsets count elements, are int64 without gaps and are brought into low … high. */
typedef struct {
  qg_ref x, y, offsets;
  int64_t rank, shape[QG_RANK], x_strides[QG_RANK], y_strides[QG_RANK];
  int64_t count, x_axis;
  int64_t low, high, op;
} qg_scatter;

/* Random words as MLX draws them: y (keys, words), uint32, for keys (keys, 2).  Word i and word
 * i + ceil(words / 2) are the halves of one block of Threefry. */
typedef struct {
  qg_ref keys, y; /* both uint32 without gaps */
  int64_t count, words;
} qg_random;

/* ---- Functions ------------------------------------------------------------------------------ */

typedef struct {
  int64_t version; /* QG_VERSION */
  int64_t buffers, steps, args_bytes, pointers; /* how many */
  int64_t arena_bytes, private_bytes;
  const qg_buffer* buffer;
  const qg_step* step;
  const uint8_t* args;
} qg_region;

#ifdef __cplusplus
extern "C" {
#endif

/* A region made ready, to be run any number of times from any thread; it keeps copies of what it is
 * given.  Null, and why in `words` (of `room` bytes), where something is wrong with it. */
void* qgraph_region_make(const qg_region* region, char* words, int64_t room);

/* Run it with one address for each QG_GIVEN place, on up to `threads` threads.  0, or not 0 with
 * the reason in `words`: too little memory.  `nanoseconds`: room for one number a step, or null;
 * the time of a phase is counted at its first step. */
int qgraph_region_run(void* region, void* const* pointers, int threads, int64_t* nanoseconds,
                      char* words, int64_t room);

/* Bytes a run takes beyond what it is given: arena, scratch, and what threads have of their own. */
int64_t qgraph_region_memory(void* region, int threads);

void qgraph_region_free(void* region);

/* What this library was built for: "avx512", "avx2", "neon" or "generic". */
const char* qgraph_instructions(void);

/* 1 if the processor multiplies bytes by bytes, so that a product with x in codes is fast. */
int qgraph_multiplies_bytes(void);

#ifdef __cplusplus
}
#endif
#endif
