"""What the machine can do, measured, and what each kernel needs of it, modelled.

The models are deliberately simple: they count what the algorithm must issue or move, and leave out sorting, calibration, the
products of cells with cells, and vectors that a short list does not fill.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from _cases import ITERATIONS

# In registers only: what the arithmetic pipes give when nothing waits for memory. `pair` is the direct sum's inner loop
# (csrc/cpu/pair_sums.h) with its loads and stores left out.
PROGRAM = r"""
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#define BYTES 64
#define IN_REGISTER(v) asm volatile("" : "+v"(v))
#elif defined(__AVX2__)
#define BYTES 32
#define IN_REGISTER(v) asm volatile("" : "+x"(v))
#else
#define BYTES 16
#if defined(__aarch64__)
#define IN_REGISTER(v) asm volatile("" : "+w"(v))
#else
#define IN_REGISTER(v) asm volatile("" : "+x"(v))
#endif
#endif
typedef float V __attribute__((vector_size(BYTES)));

static inline V splat(float x) { return x - V{}; }
static inline V estimate(V x) {
#if defined(__AVX512F__)
  return (V)_mm512_rcp14_ps((__m512)x);
#else
  return 1.f / x;  // these kernels divide
#endif
}
static inline V reciprocal(V x) {
#if defined(__AVX512F__)
  V r = estimate(x);
  return r + r * (1.f - x * r);
#else
  return estimate(x);
#endif
}

// Twelve independent chains cover the latency of any pipe here.
template <class F>
static void chains(long steps, F step) {
  V acc[12];
  for (int k = 0; k < 12; ++k) acc[k] = splat(1.f + k);
  for (long i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < 12; ++k) acc[k] = step(acc[k]);
  }
  for (int k = 0; k < 12; ++k) IN_REGISTER(acc[k]);
}
static void fma_chains(long steps) {
  V a = splat(0.5f), b = splat(1.f);
  IN_REGISTER(a);
  IN_REGISTER(b);
  chains(steps, [=](V x) { return x * a + b; });
}
static void reciprocal_chains(long steps) { chains(steps, [](V x) { return estimate(x); }); }
// 4 rows by a vector of columns, three times: 12 vectors of pairs.
static void pair_tiles(long steps) {
  V up[4], acc[4], down = splat(0.75f);
  for (int r = 0; r < 4; ++r) {
    up[r] = splat(1.f + r);
    acc[r] = V{};
    IN_REGISTER(up[r]);
  }
  for (long i = 0; i < 3 * steps; ++i) {
    IN_REGISTER(down);  // as if loaded
    V tile = {};
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const V p = reciprocal(1.f + up[r] * down);
      acc[r] += p;
      tile += p;
    }
    IN_REGISTER(tile);  // as if stored
  }
  for (int r = 0; r < 4; ++r) IN_REGISTER(acc[r]);
}

// Vectors per nanosecond, all threads together, the best of five.
static double rate(void (*run)(long), int threads, double seconds) {
  using clock = std::chrono::steady_clock;
  auto spent = [&](long steps) {
    const auto start = clock::now();
    run(steps);
    return std::chrono::duration<double>(clock::now() - start).count();
  };
  long steps = 1 << 16;
  spent(steps);
  while (spent(steps) < seconds / 4) steps *= 2;
  steps *= 4;
  double best = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    std::vector<std::thread> team;
    std::vector<double> rates(threads);
    for (int t = 0; t < threads; ++t) team.emplace_back([&, t] { rates[t] = 12e-9 * steps / spent(steps); });
    double total = 0;
    for (int t = 0; t < threads; ++t) {
      team[t].join();
      total += rates[t];
    }
    best = total > best ? total : best;
  }
  return best;
}

int main(int, char** argv) {
  const int threads = std::atoi(argv[1]);
  const double seconds = std::atof(argv[2]);
  std::printf("{\"lanes\": %d, \"fma\": %g, \"reciprocal\": %g, \"pair\": %g}\n", BYTES / 4, rate(fma_chains, threads, seconds),
              rate(reciprocal_chains, threads, seconds), rate(pair_tiles, threads, seconds));
}
"""

FLAGS = {"avx512": ["-mavx512f", "-mfma"], "avx2": ["-mavx2", "-mfma"]}


def measure(instruction_set: str, threads: int, quick: bool) -> dict:
    """Copy bandwidth in bytes per ns (read + written) and vectors per ns, for one thread and for `threads`.

    Where there is no compiler, "skipped" says why and the rates are missing.
    """
    floors = {"copy_bytes_per_ns": {str(t): _copy_rate(t, 2**24 if quick else 2**28) for t in sorted({1, threads})}}
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        return floors | {"skipped": "no g++ or clang++ found"}
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "floors.cpp"), str(Path(folder, "floors"))
        source.write_text(PROGRAM)
        flags = ["-std=c++17", "-O2", "-pthread", "-ffp-contract=fast", *FLAGS.get(instruction_set, [])]
        try:
            subprocess.run([compiler, *flags, str(source), "-o", program], check=True, capture_output=True, text=True)
            rates = {
                t: json.loads(subprocess.check_output([program, str(t), "0.01" if quick else "0.1"], text=True))
                for t in sorted({1, threads})
            }
        except (OSError, subprocess.CalledProcessError) as error:
            return floors | {"skipped": f"{compiler}: {getattr(error, 'stderr', None) or error}"}
    floors["lanes"] = rates[1]["lanes"]
    floors["vectors_per_ns"] = {str(t): {k: v for k, v in r.items() if k != "lanes"} for t, r in rates.items()}
    return floors


def _copy_rate(threads: int, size: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    source, target = torch.ones(size // 4), torch.zeros(size // 4)
    spent = []
    for _ in range(7):
        start = time.perf_counter_ns()
        target.copy_(source)
        spent.append(time.perf_counter_ns() - start)
    torch.set_num_threads(before)
    return 2 * size / min(spent)


# Vector instructions of the kernels, from the counts at the head of csrc/cpu/*.h, at the rate of multiply-adds:
TILT = {"document": 13, "query": 4}  # per teacher, iteration and vector of documents: an exponential; or s, and the pull of it
# Per document, its powers one vector of whatever width; with AVX-512 per vector of documents: 8 to find the cells, 7 powers,
# and for each of 4 cells (what documents of one label fill) a comparison and 8 sums.
DEPOSIT, DEPOSIT_BY_CELL = 12, 8 + 7 + 4 * 9
EVALUATE = 20  # per vector of documents
DISTILL = 35  # per vector of pairs: two sigmoids and a logarithm
LABELS = 22  # per vector of pairs: a sigmoid and a logarithm
SQUARES = 8  # per vector of documents: sums of the differences and of their squares, then the gradient


def field(documents: int, lanes: float, floors: dict) -> float:
    """Vector instructions of one linear-time sum: every document deposited and evaluated once. `lanes`: of its precision."""
    by_cell = floors["lanes"] == 16
    return documents * ((DEPOSIT_BY_CELL / lanes if by_cell else DEPOSIT) + EVALUATE / lanes)


def model(op: str, granularity: str, provider: str, shape: tuple[int, int, int], label_pairs: int, floors: dict) -> dict:
    """Milliseconds that the machine's arithmetic and its memory need for a call, and which of the two binds.

    - ensemble, direct: label pairs · T / lanes vectors of pairs (1 multiply-add, 1 reciprocal = estimate + 2 multiply-adds,
      2 additions), at their measured rate; chebyshev: documents · T · (deposit + evaluate); either with
      documents · (T + 1) · M tilts;
    - loss: 22 instructions per vector of label pairs and 35 per vector of pairs; chebyshev: one deposit and evaluation per
      document for the labels and two for the distillation, in double;
    - bytes: 4 (M + 2) in, teachers, student and labels, and 4 out per document, once. An ensemble reads no student.

    "auto" is held against the cheaper of the two sums.
    """
    queries, documents, teachers = shape
    total = queries * documents
    lanes = floors["lanes"]
    threads = max(floors["vectors_per_ns"], key=int)
    rates = floors["vectors_per_ns"][threads]
    tilt = total * (ITERATIONS + 1) * teachers * TILT[granularity] / lanes / rates["fma"]
    nanoseconds = {
        "direct": label_pairs * ITERATIONS / lanes / rates["pair"],
        "chebyshev": field(total, lanes, floors) * ITERATIONS / rates["fma"],
    }
    if op == "pile_loss":
        loss_pairs = queries * documents * (documents - 1) / 2
        labels = {
            "direct": label_pairs * LABELS / lanes / rates["fma"],
            "chebyshev": field(total, lanes / 2, floors) / rates["fma"],
        }
        distillation = {
            "direct": loss_pairs * DISTILL / lanes / rates["fma"],
            "chebyshev": 2 * field(total, lanes / 2, floors) / rates["fma"],
        }
        sums = [nanoseconds, labels, distillation]
    else:
        sums = [nanoseconds]
    operations = tilt + sum(min(by.values()) if provider == "auto" else by[provider] for by in sums)
    moved = total * 4 * (teachers + 2 + (op == "pile_loss"))
    memory = moved / floors["copy_bytes_per_ns"][threads]
    return {
        "operations_ms": operations / 1e6,
        "bytes_ms": memory / 1e6,
        "bytes": moved,
        "binding": "operations" if operations >= memory else "bytes",
    }


def pair_loss_model(op: str, documents: int, label_pairs: int, floors: dict, dtype: str = "float32") -> dict:
    """The same for a loss alone, by the cheaper of the two sums: `pairwise_logistic`, or `pairwise_distillation` of squared
    differences, which is linear. Bytes per document: its logit in and its gradient out, in the dtype, and 4 in, its label or
    target."""
    threads = max(floors["vectors_per_ns"], key=int)
    lanes, fma = floors["lanes"], floors["vectors_per_ns"][threads]["fma"]
    if op == "pairwise_logistic":
        operations = min(label_pairs * LABELS / lanes, field(documents, lanes / 2, floors)) / fma
    else:
        operations = documents * SQUARES / lanes / fma
    moved = documents * (2 * {"float64": 8, "float32": 4}.get(dtype, 2) + 4)
    memory = moved / floors["copy_bytes_per_ns"][threads]
    return {
        "operations_ms": operations / 1e6,
        "bytes_ms": memory / 1e6,
        "bytes": moved,
        "binding": "operations" if operations >= memory else "bytes",
    }
