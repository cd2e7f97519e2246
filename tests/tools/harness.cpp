// Runs every kernel without Python and torch, for tools that do not understand OpenMP (ThreadSanitizer) or are too slow
// for torch (valgrind). Threads are std::thread, inputs are allocated at their exact size. Results with several
// threads, and from several concurrent callers, must be bitwise equal to those with one thread.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string_view>
#include <thread>
#include <vector>

#include "kernels.h"

using namespace fastkd;

namespace {

thread_local int threads = 1;

// Ignores the grain, which is a hint, so that small cases are split between threads too.
void parallel_for(int64_t begin, int64_t end, int64_t, Body body, void* context) {
    const int64_t chunk = std::max<int64_t>(1, (end - begin + threads - 1) / threads);
    std::vector<std::thread> workers;
    for (int64_t i = begin; i < end; i += chunk)
        workers.emplace_back([=] { body(i, std::min(end, i + chunk), context); });
    for (std::thread& worker : workers) worker.join();
}

int64_t bytes(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }
int64_t acc(DType type) { return type == DType::f64 ? 8 : 4; }

// Random numbers of a type; half-precision types as the upper half of a float's bits (bf16) or small halves (f16).
std::vector<char> numbers(int64_t n, DType type, uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::vector<char> out(n * bytes(type));
    for (int64_t i = 0; i < n; ++i) {
        const double x = normal(random);
        const float f = static_cast<float>(x);
        uint32_t bits;
        std::memcpy(&bits, &f, 4);
        uint16_t half = static_cast<uint16_t>(bits >> 16);
        if (type == DType::f16) half = static_cast<uint16_t>((bits >> 16 & 0x8000) | (0x3000 + random() % 0x1000));
        if (type == DType::f64) std::memcpy(&out[i * 8], &x, 8);
        else if (type == DType::f32) std::memcpy(&out[i * 4], &f, 4);
        else std::memcpy(&out[i * 2], &half, 2);
    }
    return out;
}

std::vector<char> real(int64_t n, DType like, uint32_t seed) {
    return numbers(n, like == DType::f64 ? DType::f64 : DType::f32, seed);
}

struct Case {
    DType s, t;
    bool channels_last;
    int64_t n, c, h, w, height, width, teacher_h, teacher_w;
};

// All results of all kernels, concatenated.
class Outputs {
public:
    void* add(int64_t size) {
        parts_.emplace_back(size, static_cast<char>(0x7f));
        return parts_.back().data();
    }
    bool operator==(const Outputs& o) const { return parts_ == o.parts_; }
    // For comparing with another run of the program.
    size_t hash() const {
        size_t h = 0;
        for (const std::vector<char>& part : parts_) h = h * 31 + std::hash<std::string_view>()({part.data(), part.size()});
        return h;
    }

private:
    std::vector<std::vector<char>> parts_;
};

// Inputs long enough to be split at any grain. Drawn once, because at -O0 that takes longer than the kernels.
const std::vector<int64_t> many_labels = [] {
    std::vector<int64_t> labels(100'001);
    std::mt19937 random(9);
    for (int64_t& y : labels) y = random() % 19;
    return labels;
}();
const std::vector<char> many_singles = numbers(100'001, DType::f32, 8), many_doubles = numbers(100'001, DType::f64, 8);

Outputs run(const Case& x, int with_threads) {
    threads = with_threads;
    const int64_t hw = x.h * x.w, size = x.n * x.c * hw, a = acc(x.s), pixels = x.n * x.height * x.width;
    const std::vector<char> s = numbers(size, x.s, 1), t = numbers(size, x.t, 2), aux = numbers(size, x.t, 3),
                            other = numbers(x.n * x.c * x.teacher_h * x.teacher_w, x.t, 4),
                            weight = real(x.n * hw, x.s, 5), class_weight = real(x.c, x.s, 6);
    std::vector<uint8_t> small(x.n * hw), large(pixels), mask(pixels);
    std::mt19937 random(7);
    for (uint8_t& y : small) y = random() % 5 ? random() % (x.c < 250 ? x.c : 250) : 255;
    for (uint8_t& y : large) y = random() % 5 ? random() % (x.c < 250 ? x.c : 250) : 255;
    for (uint8_t& y : mask) y = random() % 2;
    std::vector<uint8_t> bits(x.c * pixels);
    for (uint8_t& y : bits) y = random() % 5 ? random() % 2 : 255;
    const Pair in{s.data(), t.data(), x.s, x.t, x.channels_last, x.n, x.c, hw, parallel_for};
    const Kernels& k = kernels();
    Outputs out;
    // The loss for each reduction: `terms` numbers or one, and the count if there is one.
    const auto loss = [&](Reduce reduce, int64_t terms, bool counted) {
        return Loss{reduce, 0.7, out.add((reduce == Reduce::none ? terms : 1) * a), counted ? out.add(a) : nullptr};
    };
    const auto gradient = [&](Reduce reduce) { return reduce == Reduce::none ? nullptr : out.add(size * bytes(x.s)); };
    const auto each_reduction = [](const auto& f) {
        for (Reduce reduce : {Reduce::sum, Reduce::mean, Reduce::none}) f(reduce);
    };
    for (Reduce reduce : {Reduce::sum, Reduce::none}) {
        for (Group group : {Group::hw, Group::nhw, Group::c, Group::chw}) {
            const int64_t groups =
                group == Group::hw ? x.n * x.c : group == Group::nhw ? x.c : group == Group::c ? x.n * hw : x.n;
            const Loss to = loss(reduce, groups, false);
            void* stats = out.add(groups * 6 * a);
            k.nfd_forward({in, group, 1e-5, to, stats});
            k.nfd_backward({in, group, {to.loss, reduce, 0.7}, stats, out.add(size * bytes(x.s))});
        }
        const Loss to = loss(reduce, x.n * x.c, false);
        void* stats = out.add(x.n * x.c * 4 * a);
        k.cwd_forward({in, 4, to, stats});
        k.cwd_backward({in, 4, {to.loss, reduce, 0.7}, stats, out.add(size * bytes(x.s))});
    }
    const Pixels labelled{small.data(), Label::u8, 255, weight.data()}, all{nullptr, Label::none, 255, nullptr};
    for (const Pixels& p : {labelled, all}) each_reduction([&](Reduce reduce) {
        for (bool sigmoid : {false, true}) {
            k.kd({in, p, 2, loss(reduce, x.n * hw, true), nullptr, sigmoid});
            k.kd({in, p, 2, loss(reduce, x.n * hw, true), gradient(reduce), sigmoid});
        }
    });
    const Map student{s.data(), x.s, x.channels_last, x.n, x.c, x.h, x.w},
        teacher{other.data(), x.t, false, x.n, x.c, x.teacher_h, x.teacher_w};
    for (bool corners : {false, true}) {
        const LabelPixels p{large.data(), Label::u8, 255, class_weight.data(), weight.data(), x.h, x.w, mask.data(), x.c};
        each_reduction([&](Reduce reduce) {
            const auto resized = [&] {
                return Resized{p, x.height, x.width, corners, loss(reduce, pixels, true), gradient(reduce), parallel_for};
            };
            k.resized_cross_entropy({student, resized(), 0, 0});
            k.resized_cross_entropy({student, resized(), 0, 2.5});
            Resized kept = resized();
            kept.pixels.keep_weight = true;
            k.resized_cross_entropy({student, kept, 0.1, 0});
            k.resized_kd({student, teacher, 2, resized(), false});
            k.resized_kd({student, teacher, 2, resized(), true});
            const LabelPixels one{bits.data(), Label::u8, 255, nullptr, weight.data(), x.h, x.w, nullptr, 2, x.c};
            k.resized_binary_cross_entropy(
                {student,
                 {one, x.height, x.width, corners, loss(reduce, x.c * pixels, true), gradient(reduce), parallel_for},
                 class_weight.data()});
        });
        for (int64_t columns : {3, 4, 5}) {
            const LabelPixels plain{large.data(), Label::u8, 255, nullptr, nullptr, 0, 0, nullptr, x.c};
            ResizedDice dice{student, {plain, x.height, x.width, corners, {}, nullptr, parallel_for},
                             columns == 4, columns, static_cast<double*>(out.add(x.n * x.c * columns * 8)), nullptr};
            k.resized_dice(dice);
            dice.grad = dice.sums;
            dice.to.gradient = gradient(Reduce::sum);
            k.resized_dice(dice);
        }
        for (int64_t kept : {int64_t{0}, pixels / 2})
            k.difficulty_mask({student, teacher, p, x.height, x.width, corners, 0.7, kept, corners, Select::exclusive,
                               static_cast<uint8_t*>(out.add(pixels)), out.add(a), parallel_for});
    }
    if ((x.s == DType::f64) == (x.t == DType::f64)) {
        const Pair heads{t.data(), aux.data(), x.t, x.t, x.channels_last, x.n, x.c, hw, parallel_for};
        k.teacher_confidence({heads, true, out.add(x.n * hw * a), s.data(), x.s, loss(Reduce::sum, 1, false),
                              out.add(size * bytes(x.s))});
        k.teacher_confidence({heads, false, out.add(x.n * hw * a), nullptr, x.s, {}, nullptr});
    }
    for (double factor : {1.0, -0.3}) {
        const float single = static_cast<float>(factor);
        void* scaled = out.add(size * bytes(x.s));
        std::memcpy(scaled, s.data(), s.size());
        k.rescale({scaled, x.s, size, x.s == DType::f64 ? static_cast<const void*>(&factor) : &single, parallel_for});
    }
    std::vector<int64_t> labels = many_labels;
    for (int64_t bad : {int64_t{-1}, int64_t{70'000}}) {
        if (bad >= 0) labels[bad] = 19, labels[bad + 9] = -1;
        const int64_t found = k.first_bad_label({labels.data(), Label::i64, 100'001, 19, 255, parallel_for});
        std::memcpy(out.add(8), &found, 8);
    }
    const bool twice = x.s == DType::f64;
    const std::vector<char>& many = twice ? many_doubles : many_singles;
    k.kth_smallest(many.data(), twice ? DType::f64 : DType::f32, 100'001, 5'000, out.add(a), parallel_for);
    return out;
}

}  // namespace

int main() {
    const DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16, f64 = DType::f64;
    const Case cases[] = {
        {f32, f32, false, 2, 19, 5, 37, 16, 70, 5, 37}, {f32, bf16, true, 1, 5, 33, 70, 33, 70, 5, 9},
        {bf16, f32, false, 3, 130, 4, 9, 7, 50, 6, 8},  {f16, f16, true, 1, 150, 3, 17, 11, 3, 3, 17},
        {f64, f64, false, 2, 7, 5, 11, 12, 40, 3, 4},   {f64, f64, true, 1, 3, 1, 1, 5, 5, 1, 1},
        {f32, f32, true, 1, 1100, 2, 3, 4, 9, 2, 3},    {f32, f16, false, 1, 1, 20, 130, 30, 150, 20, 130},
    };
    int failed = 0;
    for (const Case& x : cases) {
        const Outputs want = run(x, 1);
        bool good = run(x, 5) == want;
        std::vector<char> callers(&x - cases < 3 ? 2 : 0);  // a few cases suffice: callers share the same state in all
        std::vector<std::thread> at_once;
        for (char& ok : callers) at_once.emplace_back([&] { ok = run(x, 2) == want; });
        for (std::thread& caller : at_once) caller.join();
        for (char ok : callers) good = good && ok;
        failed += !good;
        std::printf("%s: (%ld, %ld, %ld, %ld) %s, %016zx\n", kernels().isa, long(x.n), long(x.c), long(x.h), long(x.w),
                    good ? "same" : "DIFFERS", want.hash());
    }
    return failed;
}
