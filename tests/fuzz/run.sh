#!/bin/sh
# Fuzzes everything that reads bytes from outside, each target for SECONDS (60) on one core; TARGETS names some of them.
# What crashes stands in target/fuzz/TARGET-crash-*, and again with: FUZZ_TARGET=... target/fuzz/.../fuzz FILE
set -eu
cd "$(dirname "$0")"
seconds=${SECONDS_EACH:-60}
out=$PWD/../../target/fuzz
host=$(rustc -vV | sed -n 's/^host: //p')
mkdir -p "$out"

# libFuzzer's counters, by options that a stable compiler has.
RUSTFLAGS='--cfg fuzzing -C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=4
 -C llvm-args=-sanitizer-coverage-inline-8bit-counters -C llvm-args=-sanitizer-coverage-pc-table
 -C llvm-args=-sanitizer-coverage-trace-compares -C codegen-units=1' \
    cargo build --release --quiet --target "$host" --target-dir "$out"

for target in ${TARGETS:-requests body target cursor journal events}; do
    echo "== $target, $seconds s"
    mkdir -p "$out/corpus/$target"
    FUZZ_TARGET=$target "$out/$host/release/fuzz" "$out/corpus/$target" "seeds/$target" \
        -max_total_time="$seconds" -timeout=5 -rss_limit_mb=512 -max_len=8192 -print_final_stats=1 -verbosity=1 \
        -artifact_prefix="$out/$target-" 2>"$out/$target.log" &
    fuzzer=$!
    trap 'kill $fuzzer 2>/dev/null || true' EXIT INT TERM
    # libFuzzer's lines come when it finds something; a person sees one line that changes.
    while kill -0 $fuzzer 2>/dev/null; do
        sleep 1
        [ ! -t 1 ] || printf '\r%.100s\033[K' "$(grep '^#' "$out/$target.log" | tail -n 1)"
    done
    [ ! -t 1 ] || printf '\r\033[K'
    if ! wait $fuzzer; then
        tail -n 40 "$out/$target.log" >&2
        exit 1
    fi
    grep -E '^#[0-9]+.*DONE|number_of_executed_units|peak_rss_mb' "$out/$target.log"
done
