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

// Looks for a magnitude that exactly k entries reach; where ties leave none, for the k-th largest,
// and `reach` exceeds k.
static int32_t threshold(const float *x, i64 n, i64 k, i64 *reach) {
    int32_t low = INT32_MAX;
    int32_t high = 0;
    for (i64 i = 0; i < n; i++) {
        int32_t m = magnitude(x[i]);
        low = m < low ? m : low;
        high = m > high ? m : high;
    }
    i64 from_low = n;  // so many reach `low`: at least k
    i64 above = 0;     // so many exceed `high`: fewer than k
    if (low == 0 && high > 0) {  // zeros, and perhaps so many that the threshold is one
        i64 count = count_from(x, n, 1);
        if (count >= k) {
            low = 1;
            from_low = count;
        } else {
            high = 0;
        }
    }
    for (int turn = 0; low < high && from_low > k; turn++) {
        // where the counts say that the k-th should be; every third time by halves, lest it creep
        double part = turn % 3 ? (double)(k - above) / (from_low - above) : 0.5;
        int32_t middle = high - (int32_t)(part * (high - low - 1));
        i64 count = count_from(x, n, middle);
        if (count >= k) {
            low = middle;
            from_low = count;
        } else {
            high = middle - 1;
            above = count;
        }
    }
    *reach = from_low;
    return low;
}

// kept: the k largest magnitudes of x, ties to the lower index
static void mask_row(const float *x, uint8_t *kept, i64 n, i64 k) {
    i64 reach;
    int32_t least = threshold(x, n, k, &reach);
    for (i64 i = 0; i < n; i++) kept[i] = magnitude(x[i]) >= least;
    for (i64 i = n - 1; reach > k; i--)  // the last of those that tie go
        if (magnitude(x[i]) == least) {
            kept[i] = 0;
            reach--;
        }
}

static void keep_row(const float *x, const uint8_t *mask, float *y, i64 n) {
    for (i64 i = 0; i < n; i++) y[i] = mask[i] ? x[i] : 0.0f;
}

// y, mask (rows, n): the k largest magnitudes of each row of x, ties to the lower index. x's rows
// lie `stride` apart.
void abstopk(const float *x, i64 stride, float *y, uint8_t *mask, i64 rows, i64 n, i64 k) {
    #pragma omp parallel for if (rows > 1 && rows * n > 1 << 14)
    for (i64 r = 0; r < rows; r++) {
        mask_row(x + r * stride, mask + r * n, n, k);
        keep_row(x + r * stride, mask + r * n, y + r * n, n);
    }
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
                mask_row(row, mask + r * n, n, j);
                for (i64 i = 0; i < n; i++)  // a protected zero would waste budget
                    if (mask[r * n + i] && row[i] > 0) mag[r * apart + i * step] = above;
            }
        }
    }
    mask_row(mag, mask, all, k);
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
