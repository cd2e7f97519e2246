// An emulated GPU for tests: runs the kernels' source unchanged on the CPU, thread by thread.
//
// Each thread of a cluster is a separate context that runs until it waits for others. The configured order decides
// which thread runs next, so a missing barrier shows up as a result that depends on the order. Shared memory is
// initialised to NaN. Data of asynchronous copies appears only when it is waited for. Undefined behaviour on a GPU is
// an error here: misaligned addresses, an mbarrier with a wrong byte count, shared memory of a block that has exited,
// writes past the end of shared memory, deadlocks, and lanes of a warp that exchange values at different places.
#pragma once

// Fortified longjmp rejects jumps between stacks, and some compilers enable it by default. Must precede the first
// header.
#undef _FORTIFY_SOURCE

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "types.h"

namespace fastkd::gpu {

enum class Order { forwards, backwards, random };

// A barrier: threads wait until all of them have arrived.
struct Gate {
    int members = 0, arrived = 0;
    int64_t generation = 0;
};

struct Copy {
    void* to;
    const void* from;
    int64_t bytes;
};

struct EmulatedBarrier {
    bool prepared = false, expected = false, complete = false;
    int64_t bytes = 0;
    std::vector<Copy> copies;
};

struct EmulatedWarp {
    Gate gate;
    char given[2][kWarp][64];
    int64_t place[2][kWarp];  // which exchange each lane is in
};

struct EmulatedSharedMemory {
    static constexpr int64_t kGuard = 1024;
    explicit EmulatedSharedMemory(int64_t size)
        : size(size), memory(static_cast<size_t>(size + kGuard + 128), static_cast<char>(0xff)) {
        const auto start = reinterpret_cast<uintptr_t>(memory.data());
        base = memory.data() + (round_up(static_cast<int64_t>(start), 128) - static_cast<int64_t>(start));
    }
    void check_guard() const {
        for (int64_t i = 0; i < kGuard; ++i)
            if (base[size + i] != static_cast<char>(0xff)) throw std::logic_error("emulation: write past shared memory");
    }
    int64_t size;
    std::vector<char> memory;
    char* base;
};

struct EmulatedBlock {
    EmulatedBlock(int64_t shared_bytes, int threads)
        : shared(shared_bytes), warps(static_cast<size_t>(threads / kWarp)), threads(threads) {
        gate.members = running = threads;
        for (EmulatedWarp& warp : warps) warp.gate.members = kWarp;
    }
    EmulatedSharedMemory shared;
    Gate gate;
    std::vector<EmulatedWarp> warps;
    EmulatedBarrier barriers[16];
    int64_t index = 0;
    const int threads;
    int running;
};

struct EmulatedThread {
    ucontext_t start{};  // used for the first entry; later switches use longjmp, which makes no system calls
    jmp_buf place{};
    bool started = false;
    std::vector<char> stack = std::vector<char>(64 * 1024);
    EmulatedBlock* block = nullptr;
    int thread = 0, parity = 0;
    Gate* gate = nullptr;  // the gate it waits for, and since which generation
    int64_t generation = 0;
    const bool* flag = nullptr;
    bool done = false;
    int64_t cluster_generation = 0;
    std::vector<std::vector<Copy>> groups = std::vector<std::vector<Copy>>(1);
};

class Emulator;

// The interface of block.h's Block.
class Block {
public:
    Block(Emulator& emulator, EmulatedThread& self) : emulator_(emulator), self_(self) {}

    int thread() const { return self_.thread; }
    int64_t index() const { return self_.block->index; }
    void sync();

    template <class X>
    X* shared(int64_t offset) {
        return reinterpret_cast<X*>(self_.block->shared.base + offset);
    }

    template <class X>
    X shuffle_xor(const X& x, int mask) {
        return exchange(x, self_.thread % kWarp ^ mask, 'x' + 256 * mask);
    }
    template <class X>
    X shuffle_up(const X& x, int by) {
        const int lane = self_.thread % kWarp;
        return exchange(x, lane < by ? lane : lane - by, 'u' + 256 * by);
    }
    bool any(bool x) { return bits(x, 'a') != 0; }
    uint32_t ballot(bool x) { return bits(x, 'b'); }
    void count(int* counter, bool counts) { *counter += counts; }
    void add(int64_t* counter, int64_t x) { *counter += x; }

    template <class X>
    const X* remote(const X* p, int rank) {
        return reinterpret_cast<const X*>(remote_base(rank) +
                                          (reinterpret_cast<const char*>(p) - self_.block->shared.base));
    }
    void cluster_arrive();
    void cluster_wait();

    void prepare_barriers(int count) {
        for (int i = 0; i < count; ++i) barrier(i).prepared = true;
    }
    void expect(int which, int64_t bytes) {
        barrier(which).bytes = bytes;
        barrier(which).expected = true;
    }
    void bulk_copy(void* to, const void* from, int64_t bytes, int which) {
        require_aligned(to, from);
        if (bytes % 16 != 0) throw std::logic_error("emulation: a bulk copy of " + std::to_string(bytes) + " bytes");
        barrier(which).copies.push_back({to, from, bytes});
    }
    void wait(int which);

    void copy_16(void* to, const void* from) {
        require_aligned(to, from);
        self_.groups.back().push_back({to, from, 16});
    }
    void end_of_group() { self_.groups.emplace_back(); }
    template <int later>
    void wait_for_groups() {
        for (int64_t i = 0; i < static_cast<int64_t>(self_.groups.size()) - 1 - later; ++i) {
            for (const Copy& copy : self_.groups[i]) memcpy(copy.to, copy.from, copy.bytes);
            self_.groups[i].clear();
        }
    }

private:
    // The value of lane `from`; all lanes must reach the same exchange.
    template <class X>
    X exchange(const X& x, int from, int64_t kind) {
        static_assert(sizeof(X) <= 64);
        if (from < 0 || from >= kWarp) throw std::logic_error("emulation: an exchange with a lane beyond the warp");
        EmulatedWarp& warp = self_.block->warps[static_cast<size_t>(self_.thread / kWarp)];
        const int lane = self_.thread % kWarp, parity = self_.parity;
        self_.parity = 1 - parity;
        memcpy(warp.given[parity][lane], &x, sizeof x);
        warp.place[parity][lane] = kind << 8 | sizeof(X);
        pass(warp.gate);
        for (const int64_t place : warp.place[parity])
            if (place != warp.place[parity][lane])
                throw std::logic_error("emulation: lanes of a warp exchange values at different places");
        X out;
        memcpy(&out, warp.given[parity][from], sizeof out);
        return out;
    }
    // Bit i: x of lane i.
    uint32_t bits(bool x, int64_t kind) {
        exchange(x, 0, kind);
        const EmulatedWarp& warp = self_.block->warps[static_cast<size_t>(self_.thread / kWarp)];
        uint32_t out = 0;
        for (int lane = 0; lane < kWarp; ++lane) out |= uint32_t{warp.given[1 - self_.parity][lane][0] != 0} << lane;
        return out;
    }
    static void require_aligned(const void* to, const void* from) {
        if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
            throw std::logic_error("emulation: an asynchronous copy of an address that is not aligned to 16 bytes");
    }
    EmulatedBarrier& barrier(int i) { return self_.block->barriers[i]; }
    const char* remote_base(int rank) const;
    void pass(Gate& gate);

    Emulator& emulator_;
    EmulatedThread& self_;
};

class Emulator {
public:
    explicit Emulator(Order order, uint32_t seed = 1) : order_(order), random_(seed) {}

    template <class Body>
    void run(const Body& body, int64_t blocks, int64_t shared_bytes, int cluster) {
        per_block_ = ThreadsOf<Body>::value;
        const int size = std::max(cluster, 1);
        if (blocks % size) throw std::logic_error("emulation: the grid is not a multiple of the cluster");
        body_ = [&body](Block& block) { body(block); };
        const int64_t clusters = blocks / size;
        for (int64_t i = 0; i < clusters; ++i)  // clusters are independent: any order is valid
            run_cluster(order_ == Order::backwards ? clusters - 1 - i : i, size, shared_bytes);
    }

    // Switches from a thread to the scheduler; returns when the thread is resumed.
    [[gnu::noinline]] void yield(EmulatedThread& thread) {
        if (_setjmp(thread.place) == 0) _longjmp(scheduler_, 1);
    }

    Gate cluster_gate;
    std::vector<std::unique_ptr<EmulatedBlock>> blocks;

private:
    void run_cluster(int64_t cluster_index, int size, int64_t shared_bytes) {
        blocks.clear();
        cluster_gate = {size * per_block_, 0, 0};
        threads_.resize(static_cast<size_t>(std::max<int64_t>(threads_.size(), size * per_block_)));
        std::vector<EmulatedThread*> waiting;
        for (int b = 0; b < size; ++b) {
            blocks.push_back(std::make_unique<EmulatedBlock>(shared_bytes, per_block_));
            blocks.back()->index = cluster_index * size + b;
            for (int t = 0; t < per_block_; ++t) {
                std::unique_ptr<EmulatedThread>& thread = threads_[static_cast<size_t>(b * per_block_ + t)];
                if (!thread) thread = std::make_unique<EmulatedThread>();
                thread->block = blocks.back().get();
                thread->thread = t;
                thread->parity = 0;
                thread->gate = nullptr;
                thread->flag = nullptr;
                thread->done = false;
                thread->groups.resize(1);
                thread->groups[0].clear();
                thread->started = false;
                waiting.push_back(thread.get());
            }
        }
        if (order_ == Order::backwards) std::reverse(waiting.begin(), waiting.end());
        while (!waiting.empty()) {
            if (order_ == Order::random) std::shuffle(waiting.begin(), waiting.end(), random_);
            bool any = false;
            for (EmulatedThread* thread : waiting) {
                if (thread->gate && thread->gate->generation == thread->generation) continue;
                if (thread->flag && !*thread->flag) continue;
                thread->gate = nullptr;
                thread->flag = nullptr;
                any = true;
                resume(*thread);
                if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
            }
            if (!any) throw std::logic_error("emulation: threads wait for each other for ever");
            waiting.erase(std::remove_if(waiting.begin(), waiting.end(), [](const auto* t) { return t->done; }),
                          waiting.end());
        }
        for (const auto& block : blocks) block->shared.check_guard();
    }

    [[gnu::noinline]] void resume(EmulatedThread& thread) {
        if (_setjmp(scheduler_) != 0) return;
        if (thread.started) _longjmp(thread.place, 1);
        thread.started = true;
        current_ = &thread;
        emulator_ = this;
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.data();
        thread.start.uc_stack.ss_size = thread.stack.size();
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, &Emulator::enter, 0);
        setcontext(&thread.start);
    }

    static void enter() {
        Emulator& emulator = *emulator_;
        EmulatedThread& self = *current_;
        try {
            Block block(emulator, self);
            emulator.body_(block);
        } catch (...) {
            emulator.error_ = std::current_exception();
        }
        self.done = true;
        --self.block->running;
        emulator.yield(self);
    }

    static inline thread_local Emulator* emulator_ = nullptr;
    static inline thread_local EmulatedThread* current_ = nullptr;

    const Order order_;
    int per_block_ = kThreads;
    std::mt19937 random_;
    std::function<void(Block&)> body_;
    std::vector<std::unique_ptr<EmulatedThread>> threads_;
    jmp_buf scheduler_{};
    std::exception_ptr error_;
};

inline void Block::pass(Gate& gate) {
    self_.generation = gate.generation;
    if (++gate.arrived == gate.members) {
        gate.arrived = 0;
        ++gate.generation;
        return;
    }
    self_.gate = &gate;
    emulator_.yield(self_);
}
inline void Block::sync() { pass(self_.block->gate); }
inline void Block::cluster_arrive() {
    Gate& gate = emulator_.cluster_gate;
    self_.cluster_generation = gate.generation;
    if (++gate.arrived == gate.members) {
        gate.arrived = 0;
        ++gate.generation;
    }
}
inline void Block::cluster_wait() {
    Gate& gate = emulator_.cluster_gate;
    if (gate.generation != self_.cluster_generation) return;
    self_.generation = self_.cluster_generation;
    self_.gate = &gate;
    emulator_.yield(self_);
}
inline const char* Block::remote_base(int rank) const {
    const EmulatedBlock& block = *emulator_.blocks.at(static_cast<size_t>(rank));
    if (block.running < block.threads) throw std::logic_error("emulation: shared memory of a block that is ending is read");
    return block.shared.base;
}
inline void Block::wait(int which) {
    EmulatedBarrier& b = barrier(which);
    if (!b.prepared) throw std::logic_error("emulation: an mbarrier is waited for before it is prepared");
    if (!b.expected) {
        self_.flag = &b.expected;
        emulator_.yield(self_);
    }
    if (b.complete) return;
    int64_t bytes = 0;
    for (const Copy& copy : b.copies) {
        memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
        bytes += copy.bytes;
    }
    if (bytes != b.bytes)
        throw std::logic_error("emulation: an mbarrier expects " + std::to_string(b.bytes) + " bytes, and " +
                               std::to_string(bytes) + " come");
    b.complete = true;
}

// Same launch interface as block.h's Launcher.
struct Launcher {
    Order order;

    template <class Body>
    void operator()(const Body& body, int64_t blocks, int64_t shared, int cluster = 0) const {
        Emulator(order).run(body, blocks, shared, cluster);
    }
};

}  // namespace fastkd::gpu
