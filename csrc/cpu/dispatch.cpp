// Selects the instruction set once per process: FASTKD_CPU_ISA if set, else the widest that the machine supports.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastkd {

namespace baseline {
Kernels table();
}
#if defined(__x86_64__)
namespace avx2 {
Kernels table();
}
namespace avx512 {
Kernels table();
}
#endif

namespace {

bool supported(const std::string& isa) {
#if defined(__x86_64__)
    if (isa == "avx512")
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return isa == "baseline";
}

Kernels choose() {
    const char* wanted = std::getenv("FASTKD_CPU_ISA");
    std::string isa = wanted ? wanted : "";
    if (isa.empty()) isa = supported("avx512") ? "avx512" : supported("avx2") ? "avx2" : "baseline";
    if (isa != "baseline" && isa != "avx2" && isa != "avx512")
        throw std::runtime_error("FASTKD_CPU_ISA is '" + isa + "', expected baseline, avx2 or avx512");
    if (!supported(isa))
        throw std::runtime_error("FASTKD_CPU_ISA is '" + isa + "', which this processor does not have; unset it");
#if defined(__x86_64__)
    if (isa == "avx512") return avx512::table();
    if (isa == "avx2") return avx2::table();
#endif
    return baseline::table();
}

}  // namespace

const Kernels& kernels() {
    static const Kernels chosen = choose();
    return chosen;
}

}  // namespace fastkd
