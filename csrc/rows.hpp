// The loops of the row kernel: the one loop with its tail, and the passes over a block of a row.
#pragma once

#include "divergences.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// A block stays in L1; with two accumulators each float lane adds 32 terms before the sum goes on in double.
template <class T>
constexpr int kBlock = 64 * kVecBytes / int(sizeof(float));

// Calls f(j, k, width): `width` vectors from element j on, a constant for the compiler. By kAtOnce whole vectors,
// then one by one; k counts the elements of a single vector, fewer than its lanes in the tail and in the `head`
// that leads to an aligned address.
template <class T, int kAtOnce = 2, class F>
inline void for_each(int n, int head, F f) {
  constexpr int lanes = kLanes<T>;
  constexpr std::integral_constant<int, 1> single;
  constexpr std::integral_constant<int, kAtOnce> several;
  int j = 0;
  if (head > 0) f(0, head, single), j = head;
  for (; j + kAtOnce * lanes <= n; j += kAtOnce * lanes) f(j, lanes, several);
  for (; j + lanes <= n; j += lanes) f(j, lanes, single);
  if (j < n) f(j, n - j, single);
}

template <class T>
inline Vec<T> load(const T* p, int k) {
  return k == kLanes<T> ? load(p) : load_first(p, k, std::numeric_limits<T>::lowest());
}
template <class T>
inline void store(T* p, Vec<T> a, int k) {
  k == kLanes<T> ? store(p, a) : store_first(p, a, k);
}

// How exp(s), needed by cross-entropy, comes from exp(s / T), needed by the soft term.
enum class HardExp { none, same, square, fourth, own };

template <HardExp H, class T>
inline Vec<T> power(Vec<T> e) {
  if constexpr (H == HardExp::same) return e;
  const Vec<T> square = e * e;
  if constexpr (H == HardExp::square) return square;
  return square * square;
}

template <class T>
inline T block_maximum(const T* x, int n, T start) {
  Vec<T> a[2] = {set<T>(start), set<T>(start)};
  for_each<T>(n, 0, [&](int j, int k, auto width) {
    for (int i = 0; i < width; ++i) a[i] = max(a[i], load(x + j + i * kLanes<T>, k));
  });
  return maximum(max(a[0], a[1]));
}

// What exp2 needs: c = log2(e) / T, and the argument below which the result is 0.
template <class T>
struct Base {
  explicit Base(double temperature)
      : c(set<T>(T(1.4426950408889634 / temperature))),
        lowest(set<T>(T(Exp2<T>::lowest_exponent * temperature * 0.6931471805599453))) {}
  Vec<T> c, lowest;
};

// Sums over one block or, rescaled, over a row so far: of exp((s - max) / T), of exp((t - max) / T), of the
// latter times the difference of the shifted logits, and of exp(s - max).
struct Sums {
  double student = 0, teacher = 0, cross = 0, hard = 0;
};

template <class T>
struct Scratch {
  T* student;  // exp((s - max) / T)
  T* teacher;  // exp((t - max) / T); later h of a divergence that needs a second pass
  T* hard;     // exp(s - max), where it is not a power of the first
};

// One pass over a block that is in L1. `ahead_*` point at memory that will be needed a block from now.
// kMasked keeps 0 * inf out of the cross sum; it is only needed where a logit is -inf.
template <class T, HardExp H, bool kSoft, bool kKeep, bool kMasked>
inline Sums exponentials(const T* s, const T* t, int n, T student_max, T teacher_max, const Base<T>& soft,
                         const Base<T>& hard, const Scratch<T>& out, const char* ahead_s, int64_t step_s,
                         const char* ahead_t, int64_t step_t) {
  const Vec<T> ms = set<T>(student_max), mt = set<T>(teacher_max), soft_c = soft.c, soft_lowest = soft.lowest;
  constexpr int at_once = kSoft ? 2 : 4;  // four chains of dependent instructions in either case
  Vec<T> student[at_once], hard_sum[at_once], teacher[2] = {set<T>(0), set<T>(0)},
                                              cross[2] = {set<T>(0), set<T>(0)};
  for (int i = 0; i < at_once; ++i) student[i] = hard_sum[i] = set<T>(0);
  for_each<T, at_once>(n, 0, [&](int j, int k, auto width) {
    constexpr int w = width, lanes = kLanes<T>;
    const bool tail = k != lanes;
    prefetch(ahead_s + j * step_s);
    if constexpr (w * kVecBytes > 64) prefetch(ahead_s + (j + w / 2 * lanes) * step_s);
    if constexpr (kSoft) prefetch(ahead_t + j * step_t);
    Vec<T> shifted[kSoft ? 2 * w : w], e[kSoft ? 2 * w : w];  // the student's, then the teacher's
    for (int i = 0; i < w; ++i) shifted[i] = load(s + j + i * lanes, k) - ms;
    if constexpr (kSoft)
      for (int i = 0; i < w; ++i) shifted[w + i] = load(t + j + i * lanes, k) - mt;
    Vec<T> difference[w];  // now: later the shifted logits would wait on the stack
    if constexpr (kSoft)
      for (int i = 0; i < w; ++i) difference[i] = shifted[w + i] - shifted[i];
    exp2(shifted, soft_c, soft_lowest, e);
    for (int i = 0; i < w; ++i) {
      if (tail) e[i] = first(e[i], k);
      student[i] = student[i] + e[i];
      if constexpr (kKeep) store(out.student + j + i * lanes, e[i]);
      if constexpr (H == HardExp::square || H == HardExp::fourth) {
        const Vec<T> root = H == HardExp::square ? e[i] : e[i] * e[i];
        hard_sum[i] = fma(root, root, hard_sum[i]);
      }
    }
    if constexpr (kSoft)
      for (int i = 0; i < w; ++i) {
        Vec<T> f = e[w + i], d = difference[i];
        if (tail) f = first(f, k), d = first(d, k);
        teacher[i] = teacher[i] + f;
        cross[i] = kMasked ? cross[i] + times(f, d) : fma(f, d, cross[i]);
        if constexpr (kKeep) store(out.teacher + j + i * lanes, f);
      }
    if constexpr (H == HardExp::own) {
      Vec<T> g[w], x[w];
      for (int i = 0; i < w; ++i) x[i] = shifted[i];
      exp2(x, hard.c, hard.lowest, g);
      for (int i = 0; i < w; ++i) {
        if (tail) g[i] = first(g[i], k);
        hard_sum[i] = hard_sum[i] + g[i];
        if constexpr (kKeep) store(out.hard + j + i * lanes, g[i]);
      }
    }
  });
  for (int i = at_once / 2; i > 0; i /= 2)
    for (int k = 0; k < i; ++k)
      student[k] = student[k] + student[k + i], hard_sum[k] = hard_sum[k] + hard_sum[k + i];
  Sums r{sum(student[0]), sum(teacher[0] + teacher[1]), sum(cross[0] + cross[1]), sum(hard_sum[0])};
  if constexpr (H == HardExp::same) r.hard = r.student;
  return r;
}

// The second pass of a divergence without a shortcut: its value and sum of h over one block. h replaces the
// teacher's exponentials.
struct PointSums {
  double value = 0, h = 0;
};
template <class T>
struct Normaliser {
  T student_max, teacher_max, inverse_temperature;
  T log_ratio;               // of the student's sum to the teacher's
  double log_ratio_at_best;  // log q - log p at the student's maximum
  double beta, rest;         // rest: 1 - beta
};
// Flat: with a call left inside, value and h do not share what they have in common, and the pass takes thrice as
// long.
template <class D, class T>
[[gnu::flatten]] inline PointSums pointwise(const T* s, const T* t, int n, const Normaliser<T>& z,
                                            T student_factor, T teacher_factor, const Scratch<T>& scratch) {
  const Vec<T> student_max = set<T>(z.student_max), teacher_max = set<T>(z.teacher_max);
  const Vec<T> inverse = set<T>(z.inverse_temperature), log_ratio = set<T>(z.log_ratio);
  const Vec<T> by_student = set<T>(student_factor), by_teacher = set<T>(teacher_factor);
  const Vec<T> reference = set<T>(T(D::reference(z.log_ratio_at_best, z.beta, z.rest)));
  const Vec<T> beta = set<T>(T(z.beta)), rest = set<T>(T(z.rest));
  Vec<T> value = set<T>(0), h_sum = value;
  for_each<T>(n, 0, [&](int start, int k, auto width) {
    constexpr int w = width;
    Point<Pack<w, T>> x;
    for (int i = 0; i < w; ++i) {
      const int j = start + i * kLanes<T>;
      const Vec<T> shifted = (load(s + j, k) - student_max) - (load(t + j, k) - teacher_max);
      x.p.v[i] = load(scratch.teacher + j) * by_teacher;
      x.q.v[i] = load(scratch.student + j) * by_student;
      x.log_ratio.v[i] = shifted * inverse - log_ratio;
      x.reference.v[i] = reference, x.beta.v[i] = beta, x.rest.v[i] = rest;
    }
    Pack<w, T> v = D::value(x), h = D::d_log_q(x);
    for (int i = 0; i < w; ++i) {
      if (k != kLanes<T>) v.v[i] = first(v.v[i], k), h.v[i] = first(h.v[i], k);
      value = value + v.v[i];
      h_sum = h_sum + h.v[i];
      store(scratch.teacher + start + i * kLanes<T>, h.v[i]);
    }
  });
  return {sum(value), sum(h_sum)};
}

// The pass of mse: the sum of squares of s - t, which goes where the teacher's exponentials would be. A class that
// is masked in both adds nothing.
template <class T>
inline T squared_difference(const T* s, const T* t, int n, T* difference) {
  Vec<T> total = set<T>(0);
  for_each<T>(n, 0, [&](int start, int k, auto width) {
    for (int i = 0; i < width; ++i) {
      const int j = start + i * kLanes<T>;
      const Vec<T> a = load(s + j, k), b = load(t + j, k), masked = set<T>(-std::numeric_limits<T>::infinity());
      Vec<T> d = where_equal(a, masked, where_equal(b, masked, set<T>(0), a - b), a - b);
      if (k != kLanes<T>) d = first(d, k);
      total = fma(d, d, total);
      if (difference) store(difference + j, d);
    }
  });
  return sum(total);
}

// h_j - q_j * sum h, in place of h.
template <class T>
inline void centre(const Scratch<T>& scratch, int n, T student_factor, T h_sum) {
  for_each<T>(n, 0, [&](int start, int, auto width) {
    for (int i = 0; i < width; ++i) {
      const int j = start + i * kLanes<T>;
      const Vec<T> q = load(scratch.student + j) * set<T>(student_factor);
      store(scratch.teacher + j, fma(set<T>(-h_sum), q, load(scratch.teacher + j)));
    }
  });
}

// gradient_j = student * e_j + third * f_j + hard * exp(s_j - max) + constant - smooth * class_weight_j
template <class T>
struct Coefficients {
  T student, third, hard, constant, smooth;
  const T* class_weight;  // of this block; null where smooth is folded into constant
};
template <class T, HardExp H, bool kSoft>
inline void write_gradient(const Scratch<T>& in, int n, const Coefficients<T>& by, bool past_cache, T* out) {
  // Copies: the compiler must not think that what is stored could change them.
  const Vec<T> student = set<T>(by.student), third = set<T>(by.third), hard = set<T>(by.hard);
  const Vec<T> constant = set<T>(by.constant), smooth = set<T>(-by.smooth);
  const T* class_weight = by.class_weight;
  const auto value = [=](int j, int k) {
    Vec<T> r = constant;
    if constexpr (kSoft) r = fma(third, load(in.teacher + j), r);
    const Vec<T> e = load(in.student + j);
    if constexpr (H == HardExp::own) r = fma(hard, load(in.hard + j), r);
    if constexpr (H == HardExp::square || H == HardExp::fourth) r = fma(hard, power<H>(e), r);
    r = fma(student, e, r);
    if (class_weight) r = fma(smooth, load(class_weight + j, k), r);
    return r;
  };
  const uintptr_t address = reinterpret_cast<uintptr_t>(out);
  if (!past_cache || address % sizeof(T) != 0)
    return for_each<T>(n, 0, [&](int j, int k, auto width) {
      for (int i = 0; i < width; ++i) store(out + j + i * kLanes<T>, value(j + i * kLanes<T>, k), k);
    });
  const int misaligned = int(address % kVecBytes / sizeof(T));
  const int head = misaligned ? std::min(n, kLanes<T> - misaligned) : 0;
  for_each<T>(n, head, [&](int j, int k, auto width) {
    if (k != kLanes<T>) return store_first(out + j, value(j, k), k);
    for (int i = 0; i < width; ++i) stream(out + j + i * kLanes<T>, value(j + i * kLanes<T>, k));
  });
}

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
