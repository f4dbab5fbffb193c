#!/bin/sh
# Runs every command of the README's console blocks, word for word and in their order, against a server on a free port (those
# that say ```console minimal, against the server in one file), and compares what they print with what the README says. Ids
# differ from run to run; nothing else may.
set -eu
cd "$(dirname "$0")/.."
if ! command -v curl >/dev/null; then
    echo 'smoke test left out: curl is missing (Debian: apt-get install curl)' >&2
    [ "${CI:-}" != true ]
    exit
fi
programs=$PWD/target/release
readme=$PWD/README.md
dir=$(mktemp -d)
trap 'kill $(cat "$dir"/*.pid) 2>/dev/null || true; rm -rf "$dir"' EXIT
cd "$dir"

# The README says port 3000; curl's own configuration, which is in a directory for each, leads it to the port that the
# server has.
serve() { # NAME COMMAND…
    name=$1
    shift
    mkdir "$name"
    "$@" >"$name.out" 2>"$name.err" &
    echo $! >"$name.pid"
    until grep -qs listens "$name.out"; do sleep 0.05; done
    port=$(sed -n 's|.*http://127.0.0.1:\([0-9]*\) .*|\1|p' "$name.out")
    printf 'connect-to = "localhost:3000:127.0.0.1:%s"\nmax-time = 60\n' "$port" >"$name/.curlrc"
}
serve brooklet "$programs/brooklet" --listen 127.0.0.1:0 --log off
serve minimal "$programs/brooklet-minimal" 127.0.0.1:0
export CURL_HOME="$dir/brooklet"

# A log of 10,000 lines, for the command that follows one.
seq 1 10000 | sed 's/.*/& a line, "quoted", with \\ and	tab/' >app.log

# Each command into N.sh, what it must print into N.expected, and whose it is into N.server.
awk '/^```console/ { on = $2 == "" ? "brooklet" : $2; next }  /^```/ { on = ""; next }
     on && /^\$ / { n++; print substr($0, 3) > (n ".sh"); printf "" > (n ".expected"); print on > (n ".server"); next }
     on { print > (n ".expected") }' "$readme"

ids() { sed -E 's/[0-9]{13}-[0-9]+|[0-9]{16}/ID/g; s/[0-9]{13}/MS/g'; }
same() { ids <"$1.expected" >want; head -n "$(wc -l <want)" "$1.out" | ids >got; cmp -s want got; }
fail() { echo "FAILED: $(cat "$1.sh")" >&2; diff want got >&2 || true; exit 1; }

curl -sN localhost:3000/events/log >log.out &
echo $! >log.pid
until [ -s log.out ]; do sleep 0.05; done

passed=0
for script in $(ls ./*.sh | sort -t/ -k2n); do
    n=$(basename "$script" .sh)
    CURL_HOME=$dir/$(cat "$n.server")
    case $(cat "$script") in
    *'curl -N '* | tail*) # goes on until it is stopped, so what it has printed is looked at in the end
        sh "$script" >"$n.out" 2>"$n.err" &
        echo $! >"$n.pid"
        if grep -q events "$script" && [ -s "$n.expected" ]; then until [ -s "$n.out" ]; do sleep 0.05; done; fi ;;
    *metrics*) # when all lines of the log have arrived
        until [ "$(grep -c '^data: ' log.out)" -ge 10000 ]; do sleep 0.05; done
        sh "$script" >"$n.out" 2>"$n.err"
        same "$n" || fail "$n" ;;
    *)
        sh "$script" >"$n.out" 2>"$n.err"
        same "$n" || fail "$n" ;;
    esac
    passed=$((passed + 1))
done
for pid in *.pid; do
    n=${pid%.pid}
    [ -f "$n.sh" ] || continue
    tries=0
    until same "$n"; do
        tries=$((tries + 1))
        [ $tries -lt 300 ] || fail "$n"
        sleep 0.1
    done
done
sed -n 's/^data: //p' log.out | cmp - app.log || { echo 'FAILED: the log did not arrive line for line' >&2; exit 1; }
echo "smoke: $passed passed, 0 failed"
