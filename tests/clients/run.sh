#!/bin/sh
# Tries the server against what people really use: run.sh [clients] [proxies] [browser], or all of them.
# Whatever that needs is installed and run in target/clients, so that the source tree stays as it is.
set -eu
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin # where nginx is
target=$PWD/target/clients
wanted=" ${*:-clients proxies browser} "
left_out=0

have() { command -v "$1" >/dev/null 2>&1; }
wants() { case $wanted in *" $1 "*) ;; *) return 1 ;; esac; }
# What is missing is said in one line, and is a failure where everything must be there.
leave_out() {
    echo "clients: $1 left out, $2 (make setup installs everything)" >&2
    left_out=1
}
end() {
    if [ "${CI:-}" = true ] && [ $left_out = 1 ]; then
        echo 'clients: FAILED, since under CI=true nothing may be left out' >&2
        exit 1
    fi
    exit "$1"
}
# once FILE COMMAND: installs what FILE names, unless that was done before.
once() {
    file=tests/clients/$1 done=$target/$(basename "$1").installed
    shift
    if cmp -s "$file" "$done"; then return; fi
    echo "clients: installing what $file names" >&2
    if (cd "$target" && "$@") >"$target/install.log" 2>&1; then cp "$file" "$done"; else
        cat "$target/install.log" >&2
        return 1
    fi
}

if ! have npm; then
    leave_out 'all of it' 'npm is missing'
    end 0
fi
began=$(date +%s)
mkdir -p "$target"
cp -R tests/clients/. "$target"
if ! once package-lock.json npm ci --ignore-scripts; then
    leave_out 'all of it' 'npm could not install its packages'
    end 0
fi
node=$(ls "$target"/node_modules/node-linux-*/bin/node 2>/dev/null || true)
if ! [ -x "$node" ]; then
    leave_out 'all of it' "there is no package of Node for $(uname -sm)"
    end 0
fi

set --
if wants clients; then
    set -- "$@" clients
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then leave_out 'Python' 'python3-venv is missing'
    elif once requirements.txt sh -c 'python3 -m venv --clear venv && venv/bin/pip install --requirement requirements.txt'; then
        set -- "$@" --has=python
    else leave_out 'Python' 'pip could not install its packages'; fi
    if once rust/Cargo.lock cargo build --quiet --locked --manifest-path rust/Cargo.toml --target-dir rust/target; then
        set -- "$@" --has=rust
    else leave_out 'Rust' 'cargo could not build its packages'; fi
    for tool in curl perl php; do
        if have $tool; then set -- "$@" --has=$tool; else leave_out "$tool" 'it is missing'; fi
    done
    if lua5.4 -e "require 'socket'" 2>/dev/null; then set -- "$@" --has=lua; else leave_out 'Lua' 'lua5.4 or lua-socket is missing'; fi
fi
if wants proxies; then
    set -- "$@" proxies
    for proxy in nginx caddy; do
        if have $proxy; then set -- "$@" --has=$proxy; else leave_out "$proxy" 'it is missing'; fi
    done
fi
if wants browser; then
    if have chromium; then set -- "$@" browser; else leave_out 'the browser' 'chromium is missing'; fi
fi
echo "  tools: ready in $(($(date +%s) - began)) s"

code=0
"$node" "$target/run.mjs" "$@" || code=$?
end $code
