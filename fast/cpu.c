// The operations of ops.py, where each has its few lines of PyTorch, on a CPU: float32, rows in
// parallel. __init__.py compiles this on first use, and calls it.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;

#ifdef __GLIBC__
#include <malloc.h>
// Keep the memory of large tensors: handed back after use, it would be faulted in anew.
__attribute__((constructor)) static void keep_memory(void) {
    // an older glibc takes at most 1 << 25; without the first, the second alone makes matters worse
    if (mallopt(M_MMAP_THRESHOLD, 1 << 30) || mallopt(M_MMAP_THRESHOLD, 1 << 25))
        mallopt(M_TRIM_THRESHOLD, INT32_MAX);
}
#endif

// --- AbsTopK ------------------------------------------------------------------------------------

// Magnitudes order as the integers of the same bits do; a NaN comes out above all of them, and so
// is kept and seen.
static inline int32_t magnitude(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7fffffff;
}

static inline float as_float(int32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline i64 count_block(const float *x, i64 n, int32_t least) {
    int32_t count = 0;  // as wide as a magnitude, so that both fill a vector register
    for (i64 i = 0; i < n; i++) count += magnitude(x[i]) >= least;
    return count;
}

static i64 count_in_parallel(const float *x, i64 n, int32_t least) {
    const i64 block = 1 << 15;
    i64 count = 0;
    #pragma omp parallel for reduction(+ : count)
    for (i64 i = 0; i < n; i += block) {
        i64 here = n - i < block ? n - i : block;
        count += count_block(x + i, here, least);
    }
    return count;
}

// How many of n entries reach a magnitude. More threads pay for many entries only.
static inline i64 count_from(const float *x, i64 n, int32_t least) {
    return n > 1 << 16 ? count_in_parallel(x, n, least) : count_block(x, n, least);
}

// What a search knows: at least k entries reach `low`, fewer than k exceed `high`.
typedef struct {
    int32_t low, high;
    i64 from_low, above;  // how many reach `low`, and how many exceed `high`
} bracket;

// What a row's search leaves to the next row's: its threshold, and how many steps of magnitude lay
// between one entry and the next thereabouts. All zero: nothing is known.
typedef struct {
    int32_t least;
    double gap;
} hint;

// Draws the bracket in at `middle`. Returns by how many the entries that reach it exceed k.
static i64 ask(bracket *b, const float *x, i64 n, i64 k, int32_t middle) {
    i64 count = count_from(x, n, middle);
    if (count >= k) {
        b->low = middle;
        b->from_low = count;
    } else {
        b->high = middle - 1;
        b->above = count;
    }
    return count - k;
}

static bracket between_extremes(const float *x, i64 n, i64 k) {
    bracket b = {INT32_MAX, 0, n, 0};
    for (i64 i = 0; i < n; i++) {
        int32_t m = magnitude(x[i]);
        b.low = m < b.low ? m : b.low;
        b.high = m > b.high ? m : b.high;
    }
    // zeros, and perhaps so many that the threshold is one
    if (b.low == 0 && b.high > 0) ask(&b, x, n, k, 1);
    return b;
}

// A bracket about the last row's threshold: rows are alike. Where this one is not, `low` is still 0
// or `high` INT32_MAX.
static bracket between_neighbours(const float *x, i64 n, i64 k, hint last) {
    bracket b = {0, INT32_MAX, n, 0};
    double middle = last.least;
    for (int turn = 0; turn < 4 && middle >= 1 && middle < INT32_MAX; turn++) {
        i64 over = ask(&b, x, n, k, middle);
        if (over == 0 || (b.low > 0 && b.high < INT32_MAX)) break;
        // twice as far as should be needed, so that the k-th is passed
        middle += 2 * (over + (over < 0 ? -1 : 1)) * last.gap;
    }
    return b;
}

// Looks for a magnitude that exactly k entries reach; where ties leave none, for the k-th largest,
// and `reach` exceeds k.
static int32_t threshold(const float *x, i64 n, i64 k, hint *last, i64 *reach) {
    bracket b = between_neighbours(x, n, k, *last);
    if (b.from_low > k && (b.low == 0 || b.high == INT32_MAX)) b = between_extremes(x, n, k);
    last->gap = (double)(b.high - b.low) / (b.from_low - b.above);
    int halve = 0;
    while (b.low < b.high && b.from_low > k) {
        // where the counts say that the k-th should be; by halves where that led nowhere
        double part = halve ? 0.5 : (k - b.above - 0.5) / (b.from_low - b.above);
        int32_t width = b.high - b.low;
        ask(&b, x, n, k, b.high - (int32_t)(part * (width - 1)));
        halve = !halve && b.high - b.low > width / 2;
    }
    last->least = b.low;
    *reach = b.from_low;
    return b.low;
}

// mask: the k largest magnitudes of x, ties to the lower index; y = x there, else 0. Either may be
// NULL.
static void keep_row_largest(const float *x, float *y, uint8_t *mask, i64 n, i64 k, hint *last) {
    i64 reach;
    int32_t least = threshold(x, n, k, last, &reach);
    if (mask && y)  // together: the row is walked through once
        for (i64 i = 0; i < n; i++) {
            int kept = magnitude(x[i]) >= least;
            mask[i] = kept;
            y[i] = kept ? x[i] : 0.0f;
        }
    else if (mask)
        for (i64 i = 0; i < n; i++) mask[i] = magnitude(x[i]) >= least;
    else
        for (i64 i = 0; i < n; i++) y[i] = magnitude(x[i]) >= least ? x[i] : 0.0f;
    for (i64 i = n - 1; reach > k; i--)  // the last of those that tie go
        if (magnitude(x[i]) == least) {
            if (mask) mask[i] = 0;
            if (y) y[i] = 0.0f;
            reach--;
        }
}

// y (rows, n): the k largest magnitudes of each row of x, ties to the lower index, zeros elsewhere;
// mask: which these are, unless NULL. x's rows lie `stride` apart.
void abstopk(const float *x, i64 stride, float *y, uint8_t *mask, i64 rows, i64 n, i64 k) {
    #pragma omp parallel if (rows > 1 && rows * n > 1 << 14)
    {
        hint last = {0, 0};
        #pragma omp for
        for (i64 r = 0; r < rows; r++)
            keep_row_largest(x + r * stride, y + r * n, mask ? mask + r * n : NULL, n, k, &last);
    }
}

static void keep_row(const float *x, const uint8_t *mask, float *y, i64 n) {
    for (i64 i = 0; i < n; i++) y[i] = mask[i] ? x[i] : 0.0f;
}

// y (rows, n) = x where mask, else 0
void keep(const float *x, i64 stride, const uint8_t *mask, float *y, i64 rows, i64 n) {
    #pragma omp parallel for if (rows * n > 1 << 14)
    for (i64 r = 0; r < rows; r++) keep_row(x + r * stride, mask + r * n, y + r * n, n);
}

// --- gates --------------------------------------------------------------------------------------

// Backward through gate * x + (1 - gate) * constant: dx (rows, n) = grad * gate; dgate (parts, n),
// to be summed over the first, = sum over rows of grad * (x - constant).
void gate_grads(const float *grad, const float *x, const float *gate, const float *constant,
                float *dx, float *dgate, i64 parts, i64 rows, i64 n) {
    #pragma omp parallel for if (parts > 1)
    for (i64 part = 0; part < parts; part++) {
        float *sum = dgate + part * n;
        memset(sum, 0, n * sizeof(float));
        for (i64 r = part * rows / parts; r < (part + 1) * rows / parts; r++)
            for (i64 i = 0; i < n; i++) {
                dx[r * n + i] = grad[r * n + i] * gate[i];
                sum[i] += grad[r * n + i] * (x[r * n + i] - constant[i]);
            }
    }
}

// --- the optimizer's projection -----------------------------------------------------------------

// Zeroes all but the k largest magnitudes of w, of which each neuron keeps its j largest in any
// case: a neuron's n weights lie `step` apart, its first `apart` from the next one's. mag: room for
// as many entries as w; mask, too; columns: for 16 neurons of n + 16 entries for each of `parts`
// threads.
void project(float *w, float *mag, uint8_t *mask, float *columns, i64 parts, i64 neurons, i64 n,
             i64 apart, i64 step, i64 j, i64 k) {
    i64 all = neurons * n;
    i64 few = 16;      // neurons at a time: a cache line, where their weights stand in columns
    i64 far = n + 16;  // not a power of two apart, lest they crowd the same places of the cache
    int32_t top = 0;
    #pragma omp parallel for reduction(max : top) if (parts > 1)
    for (i64 i = 0; i < all; i++) {
        int32_t m = magnitude(w[i]);
        mag[i] = fabsf(w[i]);
        top = m > top ? m : top;
    }
    // What is protected gets this magnitude: above all others, but nearer to them than infinity,
    // so that the search for the threshold stays short.
    float above = nextafterf(fminf(as_float(top), FLT_MAX), INFINITY);
    #pragma omp parallel for if (parts > 1)
    for (i64 part = 0; part < parts * (j > 0); part++) {
        i64 last = (part + 1) * neurons / parts;
        for (i64 r0 = part * neurons / parts; r0 < last; r0 += few) {
            i64 end = r0 + few < last ? r0 + few : last;
            float *own = columns + part * few * far;
            for (i64 i = 0; i < n && step > 1; i++)
                for (i64 r = r0; r < end; r++) own[(r - r0) * far + i] = mag[r * apart + i * step];
            for (i64 r = r0; r < end; r++) {
                const float *row = step > 1 ? own + (r - r0) * far : mag + r * apart;
                hint last = {0, 0};
                keep_row_largest(row, NULL, mask + r * n, n, j, &last);
                for (i64 i = 0; i < n; i++)  // a protected zero would waste budget
                    if (mask[r * n + i] && row[i] > 0) mag[r * apart + i * step] = above;
            }
        }
    }
    hint last = {0, 0};
    keep_row_largest(mag, NULL, mask, all, k, &last);
    #pragma omp parallel for if (parts > 1)
    for (i64 i = 0; i < all; i++) w[i] = mask[i] ? w[i] : 0.0f;
}

// --- products with a sparse matrix --------------------------------------------------------------

// start (rows + 1): where the nonzeros of each row of w (rows, n) begin in the list of all of them.
void count_nonzeros(const float *w, i64 *start, i64 rows, i64 n) {
    #pragma omp parallel for if (rows * n > 1 << 16)
    for (i64 r = 0; r < rows; r++) {
        int32_t count = 0;
        for (i64 i = 0; i < n; i++) count += w[r * n + i] != 0;
        start[r + 1] = count;
    }
    start[0] = 0;
    for (i64 r = 0; r < rows; r++) start[r + 1] += start[r];
}

// column and value of each nonzero of w (rows, n), row by row, from where `start` says on
void take_nonzeros(const float *w, const i64 *start, int32_t *column, float *value, i64 rows,
                   i64 n) {
    #pragma omp parallel for if (rows * n > 1 << 16)
    for (i64 r = 0; r < rows; r++) {
        i64 e = start[r];
        for (i64 i = 0; i < n; i++)
            if (w[r * n + i] != 0) {
                column[e] = i;
                value[e] = w[r * n + i];
                e++;
            }
    }
}

// Tokens go through the products in tiles, channel by channel, so that a nonzero weight multiplies
// whole vector registers.
#define TOKENS 32  // of a tile: TILE in __init__.py
#define ROWS 16  // of the matrix at a time: a cache line of each token

typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(32)));
#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

// y[j][i] = x[i][j] of 8 x 8: neighbours change places, then pairs, then fours
static inline void transpose8(const float *x, i64 x_stride, float *y, i64 y_stride) {
    vec a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = *(const vec *)(x + i * x_stride);
    for (int i = 0; i < 8; i += 2) {
        b[i] = PICK(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        b[i + 1] = PICK(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += i & 1 ? 3 : 1) {
        a[i] = PICK(b[i], b[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        a[i + 2] = PICK(b[i], b[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; i++) {
        *(vec *)(y + i * y_stride) = PICK(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *(vec *)(y + (i + 4) * y_stride) = PICK(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// y (columns, rows) = x (rows, columns) transposed
static void transpose(const float *x, i64 x_stride, float *y, i64 y_stride, i64 rows,
                      i64 columns) {
    for (i64 i = 0; i < rows; i += 8)
        for (i64 j = 0; j < columns; j += 8) {
            const float *from = x + i * x_stride + j;
            float *to = y + j * y_stride + i;
            if (i + 8 <= rows && j + 8 <= columns) {
                transpose8(from, x_stride, to, y_stride);
                continue;
            }
            for (i64 r = 0; r < rows - i && r < 8; r++)  // what is left at an edge
                for (i64 c = 0; c < columns - j && c < 8; c++)
                    to[c * y_stride + r] = from[r * x_stride + c];
        }
}

// y (tokens, rows) = x (tokens, n) w' + bias. scratch: n * TOKENS floats for each of the threads.
void sparse_linear(const float *x, const i64 *start, const int32_t *column, const float *value,
                   const float *bias, float *y, float *scratch, i64 parts, i64 tokens, i64 rows,
                   i64 n) {
    i64 tiles = (tokens + TOKENS - 1) / TOKENS;
    #pragma omp parallel for if (parts > 1)
    for (i64 part = 0; part < parts; part++)
        for (i64 tile = part * tiles / parts; tile < (part + 1) * tiles / parts; tile++) {
            float *in = scratch + part * n * TOKENS;
            float out[ROWS * TOKENS];
            i64 first = tile * TOKENS;
            i64 here = tokens - first < TOKENS ? tokens - first : TOKENS;
            transpose(x + first * n, n, in, TOKENS, here, n);
            for (i64 r0 = 0; r0 < rows; r0 += ROWS) {
                i64 some = rows - r0 < ROWS ? rows - r0 : ROWS;
                for (i64 r = r0; r < r0 + some; r++) {
                    vec a = {0}, b = {0}, c = {0}, d = {0};  // TOKENS sums, in registers
                    for (i64 e = start[r]; e < start[r + 1]; e++) {
                        const vec *v = (vec *)(in + (i64)column[e] * TOKENS);
                        a += value[e] * v[0];
                        b += value[e] * v[1];
                        c += value[e] * v[2];
                        d += value[e] * v[3];
                    }
                    vec *to = (vec *)(out + (r - r0) * TOKENS);
                    to[0] = a + bias[r];
                    to[1] = b + bias[r];
                    to[2] = c + bias[r];
                    to[3] = d + bias[r];
                }
                transpose(out, TOKENS, y + first * rows + r0, rows, some, here);
            }
        }
}

// dx (tokens, n) = dy (tokens, rows) w
void sparse_linear_input_grad(const float *dy, const i64 *start, const int32_t *column,
                              const float *value, float *dx, float *scratch, i64 parts, i64 tokens,
                              i64 rows, i64 n) {
    i64 tiles = (tokens + TOKENS - 1) / TOKENS;
    #pragma omp parallel for if (parts > 1)
    for (i64 part = 0; part < parts; part++)
        for (i64 tile = part * tiles / parts; tile < (part + 1) * tiles / parts; tile++) {
            float *out = scratch + part * n * TOKENS;
            float in[ROWS * TOKENS];
            i64 first = tile * TOKENS;
            i64 here = tokens - first < TOKENS ? tokens - first : TOKENS;
            memset(out, 0, n * TOKENS * sizeof(float));
            for (i64 r0 = 0; r0 < rows; r0 += ROWS) {
                i64 some = rows - r0 < ROWS ? rows - r0 : ROWS;
                transpose(dy + first * rows + r0, rows, in, TOKENS, here, some);
                for (i64 r = r0; r < r0 + some; r++) {
                    const vec *v = (vec *)(in + (r - r0) * TOKENS);
                    vec a = v[0], b = v[1], c = v[2], d = v[3];
                    for (i64 e = start[r]; e < start[r + 1]; e++) {
                        vec *to = (vec *)(out + (i64)column[e] * TOKENS);
                        to[0] += value[e] * a;
                        to[1] += value[e] * b;
                        to[2] += value[e] * c;
                        to[3] += value[e] * d;
                    }
                }
            }
            transpose(out, TOKENS, dx + first * n, n, n, here);
        }
}

// --- RMSNorm ------------------------------------------------------------------------------------

// y (rows, n) = x * scale * weight, where scale (rows) is 1 / sqrt(mean of x^2 + eps)
void rms_norm(const float *x, const float *weight, float *y, float *scale, double eps, i64 rows,
              i64 n) {
    #pragma omp parallel for if (rows > 1 && rows * n > 1 << 14)
    for (i64 r = 0; r < rows; r++) {
        const float *row = x + r * n;
        float sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < n; i++) sum += row[i] * row[i];
        scale[r] = 1 / sqrt(sum / n + eps);
        for (i64 i = 0; i < n; i++) y[r * n + i] = row[i] * scale[r] * weight[i];
    }
}

// dx (rows, n) and dweight (parts, n), to be summed over the first, from y's gradient
void rms_norm_grads(const float *grad, const float *x, const float *weight, const float *scale,
                    float *dx, float *dweight, i64 parts, i64 rows, i64 n) {
    #pragma omp parallel for if (parts > 1)
    for (i64 part = 0; part < parts; part++) {
        float *sum = dweight + part * n;
        memset(sum, 0, n * sizeof(float));
        for (i64 r = part * rows / parts; r < (part + 1) * rows / parts; r++) {
            const float *g = grad + r * n;
            const float *row = x + r * n;
            float along = 0;  // what goes along x is undone by the scale
            #pragma omp simd reduction(+ : along)
            for (i64 i = 0; i < n; i++) along += g[i] * weight[i] * row[i];
            float back = along * scale[r] * scale[r] / n;
            for (i64 i = 0; i < n; i++) {
                dx[r * n + i] = scale[r] * (g[i] * weight[i] - row[i] * back);
                sum[i] += g[i] * row[i] * scale[r];
            }
        }
    }
}

// --- attention with a sink ----------------------------------------------------------------------

// One head of one prompt at a time: x (T, D), whose rows lie `far` apart in memory, D a multiple of
// 8. LANES queries stand beside each other in a vector register, so that no sum runs across one:
// what belongs to a key and these queries is one `vec`, and so is a channel of theirs. The backward
// pass computes the attention anew. At most O(T) numbers are held beside the head itself.
#define LANES 8

static inline vec larger(vec a, vec b) {  // b where either is NaN
    ivec more = a > b;
    return (vec)((more & (ivec)a) | (~more & (ivec)b));
}

// exp(x) of x <= 0, to 2 units in the last place; 0 below -80. NaN stays NaN.
static inline vec exp_of_negative(vec x) {
    ivec tiny = x < -80.0f;
    // x = n ln 2 + r: adding 1.5 * 2^23 rounds to an integer, and leaves that in the lowest bits
    vec shifted = x * 1.44269504f + 12582912.0f;
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;  // the polynomial of Cephes
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vec power = (vec)(((ivec)shifted - (0x4b400000 - 127)) << 23);  // 2^n
    return (vec)((ivec)(power * p) & ~tiny);
}

// s (n) = rows (n, D) x (D)
static void products(const float *rows, const vec *x, vec *s, i64 n, i64 D) {
    for (i64 d = 0; d < D; d += 8)
        for (i64 j = 0; j < n; j++) {
            const float *row = rows + j * D + d;
            vec sum = d > 0 ? s[j] : (vec){0};
            for (int i = 0; i < 8; i++) sum += row[i] * x[d + i];
            s[j] = sum;
        }
}

// y (D) = s (n) rows (n, D)
static void weighted_sum(const vec *s, const float *rows, vec *y, i64 n, i64 D) {
    for (i64 d = 0; d < D; d += 8) {
        vec sum[8] = {{0}};
        for (i64 j = 0; j < n; j++)
            for (int i = 0; i < 8; i++) sum[i] += rows[j * D + d + i] * s[j];
        for (int i = 0; i < 8; i++) y[d + i] = sum[i];
    }
}

// rows (n, D) += s (n) x (LANES, D)
static void add_products(const vec *s, const float *x, float *rows, i64 n, i64 D) {
    for (i64 d = 0; d < D; d += 8)
        for (i64 j = 0; j < n; j++) {
            vec sum = *(vec *)(rows + j * D + d);
            for (int i = 0; i < LANES; i++) sum += s[j][i] * *(const vec *)(x + i * D + d);
            *(vec *)(rows + j * D + d) = sum;
        }
}

// rows (n, D) = x without gaps, and zeros up to a multiple of LANES
static void take_rows(const float *x, i64 far, float *rows, i64 n, i64 D) {
    for (i64 t = 0; t < n; t++) {
        __builtin_prefetch(x + t * far + D);  // the next head's
        memcpy(rows + t * D, x + t * far, D * sizeof(float));
    }
    for (i64 t = n; t % LANES; t++) memset(rows + t * D, 0, D * sizeof(float));
}

// What LANES queries from t on, channels q (D), attend to: p (n) of keys (n, D), of which the last
// LANES may be later than a query. Returns what the sink takes.
static vec attend(const vec *q, const float *keys, float sink, vec *p, i64 t, i64 n, i64 D) {
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const vec none = (vec){0} - INFINITY;
    products(keys, q, p, n, D);
    vec top = (vec){0} + sink;
    for (i64 j = 0; j < n; j++) {
        ivec later = lane < (int32_t)(j - t);
        p[j] = (vec)(((ivec)(p[j] / sqrtf(D)) & ~later) | ((ivec)none & later));
        top = larger(p[j], top);
    }
    vec to_sink = exp_of_negative(sink - top);
    vec total = to_sink;
    for (i64 j = 0; j < n; j++) {
        p[j] = exp_of_negative(p[j] - top);
        total += p[j];
    }
    vec share = 1.0f / total;
    for (i64 j = 0; j < n; j++) p[j] *= share;
    return to_sink * share;
}

static void head_forward(const float *q, const float *k, const float *v, float sink, float *out,
                         float *scratch, i64 far, i64 T, i64 D) {
    i64 padded = (T + LANES - 1) / LANES * LANES;
    float *keys = scratch;
    float *values = keys + padded * D;
    float *queries = values + padded * D;
    vec *channels = (vec *)(queries + LANES * D);  // of the queries, then of their output
    vec *p = channels + D;
    take_rows(k, far, keys, T, D);
    take_rows(v, far, values, T, D);
    for (i64 t = 0; t < T; t += LANES) {
        i64 here = T - t < LANES ? T - t : LANES;
        take_rows(q + t * far, far, queries, here, D);
        transpose(queries, D, (float *)channels, LANES, LANES, D);
        attend(channels, keys, sink, p, t, t + here, D);
        weighted_sum(p, values, channels, t + here, D);
        transpose((float *)channels, LANES, out + t * far, far, D, here);
    }
}

// Returns the sink's gradient.
static float head_backward(const float *q, const float *k, const float *v, float sink,
                           const float *dout, float *dq, float *dk, float *dv, float *scratch,
                           i64 far, i64 T, i64 D) {
    i64 padded = (T + LANES - 1) / LANES * LANES;
    float *keys = scratch;
    float *values = keys + padded * D;
    float *dkeys = values + padded * D;
    float *dvalues = dkeys + padded * D;
    float *queries = dvalues + padded * D;
    float *douts = queries + LANES * D;
    vec *channels = (vec *)(douts + LANES * D);  // of the queries, of dout, then of dq
    vec *p = channels + D;
    vec *ds = p + padded;
    take_rows(k, far, keys, T, D);
    take_rows(v, far, values, T, D);
    memset(dkeys, 0, 2 * padded * D * sizeof(float));
    vec dsink = {0};
    for (i64 t = 0; t < T; t += LANES) {
        i64 here = T - t < LANES ? T - t : LANES;
        i64 n = t + here;
        take_rows(q + t * far, far, queries, here, D);
        take_rows(dout + t * far, far, douts, here, D);
        transpose(queries, D, (float *)channels, LANES, LANES, D);
        vec to_sink = attend(channels, keys, sink, p, t, n, D);

        transpose(douts, D, (float *)channels, LANES, LANES, D);
        products(values, channels, ds, n, D);
        vec mean = {0};  // the softmax passes on what differs from it
        for (i64 j = 0; j < n; j++) mean += p[j] * ds[j];
        for (i64 j = 0; j < n; j++) ds[j] = p[j] * (ds[j] - mean) / sqrtf(D);
        dsink -= to_sink * mean;

        weighted_sum(ds, keys, channels, n, D);
        transpose((float *)channels, LANES, dq + t * far, far, D, here);
        add_products(ds, queries, dkeys, n, D);
        add_products(p, douts, dvalues, n, D);
    }
    for (i64 t = 0; t < T; t++) {
        memcpy(dk + t * far, dkeys + t * D, D * sizeof(float));
        memcpy(dv + t * far, dvalues + t * D, D * sizeof(float));
    }
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += dsink[i];
    return sum;
}

// out: what q, k, v, all (B, T, H, D), attend to; sink (H). scratch: `size` floats for each of the
// threads: (4 * padded + 3 * LANES) * D + 2 * padded * LANES, where
// padded is T rounded up to a multiple of LANES.
void attention(const float *q, const float *k, const float *v, const float *sink, float *out,
               float *scratch, i64 parts, i64 size, i64 B, i64 T, i64 H, i64 D) {
    #pragma omp parallel for if (parts > 1)
    for (i64 part = 0; part < parts; part++)
        for (i64 i = part * B * H / parts; i < (part + 1) * B * H / parts; i++) {
            i64 at = i / H * T * H * D + i % H * D;
            head_forward(q + at, k + at, v + at, sink[i % H], out + at, scratch + part * size,
                         H * D, T, D);
        }
}

// dq, dk, dv, and dsink (B, H), to be summed over the first, from out's gradient
void attention_grads(const float *q, const float *k, const float *v, const float *sink,
                     const float *dout, float *dq, float *dk, float *dv, float *dsink,
                     float *scratch, i64 parts, i64 size, i64 B, i64 T, i64 H, i64 D) {
    #pragma omp parallel for if (parts > 1)
    for (i64 part = 0; part < parts; part++)
        for (i64 i = part * B * H / parts; i < (part + 1) * B * H / parts; i++) {
            i64 at = i / H * T * H * D + i % H * D;
            dsink[i] = head_backward(q + at, k + at, v + at, sink[i % H], dout + at, dq + at,
                                     dk + at, dv + at, scratch + part * size, H * D, T, D);
        }
}
