#!/bin/sh
# Would the models find a fault? Each patch in broken/ makes one in a copy of the sources, which names the model that must
# find it. `--check` only looks whether all patches still apply; VARIANTS names some of them.
set -eu
cd "$(dirname "$0")/../.."
if ! command -v patch >/dev/null; then
    echo "the models' faults left out: patch is missing (\`make setup\` installs it)" >&2
    [ "${CI:-}" != true ]
    exit
fi
copy=$PWD/target/model/broken${1:-}
mkdir -p "$copy"

lay_out() { # so that only what a patch changes is compiled again
    rm -rf "$copy/src" "$copy/tests"
    mkdir -p "$copy/tests"
    cp -pR src "$copy"
    cp -pR tests/*.rs tests/model "$copy/tests"
}

for variant in ${VARIANTS:-$(cd tests/model/broken && ls | sed -n 's/\.patch$//p')}; do
    patch=$PWD/tests/model/broken/$variant.patch
    lay_out
    # Without fuzz: a line that is put where its neighbours have changed may end up in another place.
    if ! patch --quiet --fuzz=0 --strip=1 --directory="$copy" --no-backup-if-mismatch <"$patch" >"$copy/patch.log" 2>&1; then
        cat "$copy/patch.log"
        echo "broken/$variant.patch does not apply any more: make it anew for the rooms as they are" >&2
        exit 1
    fi
    [ "${1:-}" != --check ] || continue
    model=$(sed -n 's/^Model: //p' "$patch")
    log=$PWD/target/model/$variant.log
    # With a target directory of their own, or cargo would take what is broken for what is whole: its files are not newer.
    if MODEL_TARGET=$copy/target MODEL=$model MODEL_SECONDS=${MODEL_SECONDS:-60} \
        sh "$copy/tests/model/run.sh" >"$log" 2>&1; then
        echo "$variant: not found by the model of $model; its output is in $log" >&2
        exit 1
    fi
    found=$(sed -n 's/^model .*: found in \(.*\); again with.*/\1/p' "$log" | head -n 1)
    if [ -z "$found" ]; then
        tail -n 30 "$log"
        echo "$variant: it failed before any schedule was explored: see $log" >&2
        exit 1
    fi
    printf '%-24s found in %-32s %s\n' "$variant" "$found" "$(sed -n 1p "$patch")"
done
