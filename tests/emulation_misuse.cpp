// Kernels with invalid warp exchanges, for test_cuda_plan.py.
#include "emulation.h"

#include <cstdio>

using namespace fastkd::gpu;

namespace {

template <class F>
struct Body {
    static constexpr int kThreadsOfBlock = 64;
    F f;
    void operator()(Block& block) const { f(block); }
};

template <class F>
void run(const char* name, const F& f) {
    try {
        Launcher{Order::random}(Body<F>{f}, 2, 0);
    } catch (const std::exception& error) {
        std::printf("%s: %s\n", name, error.what());
    }
}

}  // namespace

int main() {
    int sums[4] = {}, any[2] = {};
    run("sums", [&](Block& block) {
        int x = block.thread();
        for (int bit = 1; bit < kWarp; bit *= 2) x += block.shuffle_xor(x, bit);
        const int below = block.shuffle_up(block.thread(), 1);
        if (below != (block.thread() % kWarp ? block.thread() - 1 : block.thread())) throw std::logic_error("shuffle_up");
        if (block.thread() % kWarp == 0) sums[block.index() * 2 + block.thread() / kWarp] = x;
    });
    std::printf("sums: %d %d %d %d\n", sums[0], sums[1], sums[2], sums[3]);
    run("different masks", [](Block& block) { block.shuffle_xor(1, block.thread() % 2 ? 1 : 2); });
    run("up and xor", [](Block& block) { block.thread() % 2 ? block.shuffle_xor(1, 1) : block.shuffle_up(1, 1); });
    run("half a warp", [](Block& block) {
        if (block.thread() % kWarp < 16) block.shuffle_xor(1, 1);
    });
    run("beyond the warp", [](Block& block) { block.shuffle_xor(1, 32); });
    run("any", [&](Block& block) {
        const int warp = block.thread() / kWarp;
        any[warp] = block.any(block.thread() == 5);
    });
    std::printf("any: %d %d\n", any[0], any[1]);
    unsigned ballots[2] = {};
    run("ballot", [&](Block& block) {
        const int warp = block.thread() / kWarp;
        const unsigned bits = block.ballot(block.thread() == 5 || block.thread() > 61);
        if (block.thread() % kWarp == 7) ballots[warp] = bits;
    });
    std::printf("ballot: %u %u\n", ballots[0], ballots[1]);
}
