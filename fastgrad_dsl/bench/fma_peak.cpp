// Fused multiply-adds between registers alone: what no kernel on this machine can exceed.
#include <ctime>
#include <thread>
#include <vector>

// Enough independent accumulators to hide the latency of the instruction on every pipe, few enough for the registers.
#if defined(__AVX512F__)
constexpr int BYTES = 64, COUNT = 24;
#elif defined(__AVX__)
constexpr int BYTES = 32, COUNT = 12;
#elif defined(__aarch64__)
constexpr int BYTES = 16, COUNT = 24;
#else
constexpr int BYTES = 16, COUNT = 12;
#endif

typedef float Vector __attribute__((vector_size(BYTES)));
constexpr int LANES = BYTES / sizeof(float);

static float spin(long rounds, float factor, float term) {
    const Vector a = Vector{} + factor, b = Vector{} + term;
    Vector sums[COUNT];
    for (int i = 0; i < COUNT; ++i) sums[i] = Vector{} + float(i);
    for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
        for (int i = 0; i < COUNT; ++i) sums[i] = sums[i] * a + b;
    }
    Vector sum = {};
    for (int i = 0; i < COUNT; ++i) sum += sums[i];
    return sum[0];
}

static double processor_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Floating-point operations a second of processor time, of `threads` threads at once, added up: what else runs on the
// machine does not count. The factors are arguments, so that nothing is known when this is compiled; a factor below 1
// keeps the numbers small and normal.
extern "C" double fma_peak(int threads, long rounds, float factor, float term) {
    std::vector<float> results(threads);
    std::vector<double> seconds(threads);
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t)
        workers.emplace_back([=, &results, &seconds] {
            const double start = processor_seconds();
            results[t] = spin(rounds, factor, term);
            seconds[t] = processor_seconds() - start;
        });
    for (auto& worker : workers) worker.join();
    double rate = results[0] == 12345.678f ? 1.0 : 0.0;  // the results are used
    for (const double taken : seconds) rate += 2.0 * LANES * COUNT * double(rounds) / taken;
    return rate;
}
