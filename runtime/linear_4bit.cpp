// Products of few rows with a matrix in 4 bits, on a CPU: each code is read once and never written out dense.
//
// A product of one row reads every weight once, so its time is that of reading them: 4 bits each, a quarter or an
// eighth of what a dense matrix has. Codes are looked up in a register (a permutation), multiplied in float32, summed
// by block, and the sum of a block multiplied by its scale, which double quantization has in 8 bits.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t STEP = 32;           // values looked up at a time: 16 bytes
constexpr int64_t NESTED = 256;        // scales of a block of double quantization
constexpr int64_t SERIAL = 64 * 1024;  // fewer weights are not worth another thread

// Of each kind of CPU: `Levels` looks STEP values up, `Sums` adds their products with STEP values of x, MOST is for
// how many rows of x there are registers, and `arrange` puts STEP values of x in the order in which they are looked up.

#if defined(CPU_CAPABILITY_AVX512)

constexpr int MOST = 8;

struct Values {
  __m512 a, b;
};

Values load(const float* x) { return {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)}; }

struct Sums {
  __m512 a = _mm512_setzero_ps(), b = _mm512_setzero_ps();
  void add_product(const Values& w, const float* x) {
    a = _mm512_fmadd_ps(w.a, _mm512_loadu_ps(x), a);
    b = _mm512_fmadd_ps(w.b, _mm512_loadu_ps(x + 16), b);
  }
  void add_scaled(const Sums& of, float scale) {
    a = _mm512_fmadd_ps(of.a, _mm512_set1_ps(scale), a);
    b = _mm512_fmadd_ps(of.b, _mm512_set1_ps(scale), b);
  }
  float sum() const { return _mm512_reduce_add_ps(_mm512_add_ps(a, b)); }
};

struct Levels {
  __m512 all;
  explicit Levels(const float* levels) : all(_mm512_loadu_ps(levels)) {}
  Values look_up(const uint8_t* codes) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i four = _mm_set1_epi8(15);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), four), low = _mm_and_si128(bytes, four);
    return {_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(high, low)), all),
            _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(high, low)), all)};
  }
};

void arrange(const float* x, float* to) { std::copy(x, x + STEP, to); }

#elif defined(CPU_CAPABILITY_AVX2)

constexpr int MOST = 4;

struct Values {
  __m256 v[4];
};

Values load(const float* x) {
  return {{_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8), _mm256_loadu_ps(x + 16), _mm256_loadu_ps(x + 24)}};
}

struct Sums {
  __m256 a = _mm256_setzero_ps(), b = _mm256_setzero_ps();
  void add_product(const Values& w, const float* x) {
    a = _mm256_fmadd_ps(w.v[0], _mm256_loadu_ps(x), a);
    b = _mm256_fmadd_ps(w.v[1], _mm256_loadu_ps(x + 8), b);
    a = _mm256_fmadd_ps(w.v[2], _mm256_loadu_ps(x + 16), a);
    b = _mm256_fmadd_ps(w.v[3], _mm256_loadu_ps(x + 24), b);
  }
  void add_scaled(const Sums& of, float scale) {
    a = _mm256_fmadd_ps(of.a, _mm256_set1_ps(scale), a);
    b = _mm256_fmadd_ps(of.b, _mm256_set1_ps(scale), b);
  }
  float sum() const {
    alignas(32) float values[8];
    _mm256_store_ps(values, _mm256_add_ps(a, b));
    float total = 0;
    for (float value : values) total += value;
    return total;
  }
};

// A shuffle of bytes looks 32 codes up at once, in a table of 16 bytes: so there is a table for each of the four bytes of
// a level, and what was found is interleaved to float32. That is done in each half of a register by itself.
struct Levels {
  __m256i bytes[4];
  explicit Levels(const float* levels) {
    alignas(16) uint8_t table[4][16];
    const uint8_t* of = reinterpret_cast<const uint8_t*>(levels);
    for (int i = 0; i < 16; i++)
      for (int b = 0; b < 4; b++) table[b][i] = of[4 * i + b];
    for (int b = 0; b < 4; b++)
      bytes[b] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table[b])));
  }
  Values look_up(const uint8_t* codes) const {
    const __m128i read = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i four = _mm_set1_epi8(15);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(read, 4), four), low = _mm_and_si128(read, four);
    const __m256i places = _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
    __m256i found[4];
    for (int b = 0; b < 4; b++) found[b] = _mm256_shuffle_epi8(bytes[b], places);
    const __m256i low_low = _mm256_unpacklo_epi8(found[0], found[1]);
    const __m256i low_high = _mm256_unpacklo_epi8(found[2], found[3]);
    const __m256i high_low = _mm256_unpackhi_epi8(found[0], found[1]);
    const __m256i high_high = _mm256_unpackhi_epi8(found[2], found[3]);
    return {{_mm256_castsi256_ps(_mm256_unpacklo_epi16(low_low, low_high)),
             _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_low, low_high)),
             _mm256_castsi256_ps(_mm256_unpacklo_epi16(high_low, high_high)),
             _mm256_castsi256_ps(_mm256_unpackhi_epi16(high_low, high_high))}};
  }
};

void arrange(const float* x, float* to) {  // four values of the first half, four of the second, and so on
  for (int i = 0; i < 4; i++) {
    std::copy(x + 4 * i, x + 4 * i + 4, to + 8 * i);
    std::copy(x + 16 + 4 * i, x + 16 + 4 * i + 4, to + 8 * i + 4);
  }
}

#else

constexpr int MOST = 4;

struct Values {
  float v[STEP];
};

Values load(const float* x) {
  Values w;
  std::copy(x, x + STEP, w.v);
  return w;
}

struct Sums {
  float v[STEP] = {};
  void add_product(const Values& w, const float* x) {
    for (int i = 0; i < STEP; i++) v[i] += w.v[i] * x[i];
  }
  void add_scaled(const Sums& of, float scale) {
    for (int i = 0; i < STEP; i++) v[i] += of.v[i] * scale;
  }
  float sum() const {
    float total = 0;
    for (float value : v) total += value;
    return total;
  }
};

struct Levels {
  const float* levels;
  explicit Levels(const float* levels) : levels(levels) {}
  Values look_up(const uint8_t* codes) const {
    Values w;
    for (int i = 0; i < STEP / 2; i++) {
      w.v[2 * i] = levels[codes[i] >> 4];
      w.v[2 * i + 1] = levels[codes[i] & 15];
    }
    return w;
  }
};

void arrange(const float* x, float* to) { std::copy(x, x + STEP, to); }

#endif

}  // namespace

// Mirrors Arguments in linear_4bit.py.
struct Arguments {
  int64_t rows, out, in, blocksize, rank, threads;
  double scaling;
  const float* x;       // [rows, in]
  const uint8_t* codes; // [out, in], two a byte, the first in the high half
  const float* absmax;  // by block; null with double quantization, which has the next four
  const uint8_t* scales;
  const float *nested_absmax, *nested_levels, *offset;
  const float* levels;  // [16]
  const float* bias;    // [out], or null
  const float *lora_a, *lora_b;  // [rank, in], [out, rank]; null without an adapter
  float* y;             // [rows, out]
};

namespace {

float scale_of(const Arguments& a, int64_t block) {
  if (a.absmax != nullptr) return a.absmax[block];
  return a.nested_levels[a.scales[block]] * a.nested_absmax[block / NESTED] + *a.offset;
}

// One column of the result, for ROWS rows of x.
template <int ROWS>
void column(const Arguments& a, const Levels& levels, int64_t o, const float* x, const float* low, float* y) {
  Sums total[ROWS];
  const int64_t first = o * a.in, end = first + a.in;
  for (int64_t n = first; n < end;) {
    const int64_t block = n / a.blocksize;
    const int64_t stop = std::min(end, (block + 1) * a.blocksize);
    Sums part[ROWS];
    for (; n < stop; n += STEP) {
      const Values w = levels.look_up(a.codes + n / 2);
      for (int m = 0; m < ROWS; m++) part[m].add_product(w, x + m * a.in + (n - first));
    }
    const float scale = scale_of(a, block);
    for (int m = 0; m < ROWS; m++) total[m].add_scaled(part[m], scale);
  }
  for (int m = 0; m < ROWS; m++) {
    float branch = 0;
    const float *b = a.lora_b + o * a.rank, *of = low + m * a.rank;
#pragma omp simd reduction(+ : branch)
    for (int64_t r = 0; r < a.rank; r++) branch += b[r] * of[r];
    y[m * a.out + o] = total[m].sum() + (a.bias ? a.bias[o] : 0.f) + static_cast<float>(a.scaling) * branch;
  }
}

template <int ROWS>
void columns(const Arguments& a, const Levels& levels, int64_t o, const float* x, const float* low, int64_t row) {
  for (; row + ROWS <= a.rows; row += ROWS)
    column<ROWS>(a, levels, o, x + row * a.in, low + row * a.rank, a.y + row * a.out);
  if constexpr (ROWS > 1) {
    if (row < a.rows) columns<ROWS / 2>(a, levels, o, x, low, row);
  }
}

// One element of the adapter's first product.
float reduced(const Arguments& a, int64_t row, int64_t r) {
  const float *x = a.x + row * a.in, *factor = a.lora_a + r * a.in;
  Sums total;
  for (int64_t i = 0; i < a.in; i += STEP) total.add_product(load(factor + i), x + i);
  return total.sum();
}

}  // namespace

extern "C" int linear_4bit(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const int64_t count = a.rows * a.in, reductions = a.rows * a.rank;
  const std::unique_ptr<float[]> held(new (std::nothrow) float[count + reductions]);
  if (held == nullptr) return 1;
  float *x = held.get(), *low = x + count;
  for (int64_t i = 0; i < count; i += STEP) arrange(a.x + i, x + i);
  const Levels levels(a.levels);
#pragma omp parallel num_threads(a.threads) if (a.out * a.in >= SERIAL)
  {
#pragma omp for
    for (int64_t i = 0; i < reductions; i++) low[i] = reduced(a, i / a.rank, i % a.rank);
#pragma omp for
    for (int64_t o = 0; o < a.out; o++) columns<MOST>(a, levels, o, x, low, 0);
  }
  return 0;
}
