#!/bin/sh
# Runs every command of the README's console blocks, word for word and in their order, against a server on a free port, those
# of "console minimal" against the one in one file, those of "console tenants" against one with a file of tokens, and compares
# what they print with what the README says. Ids differ from run to run; nothing else may.
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

# The README says port 3000; curl's own configuration, in a directory of the server's name, leads it to the port that the
# server has.
start() {
    name=$1
    shift
    "$@" >"$name.out" 2>"$name.err" &
    echo $! >"$name.pid"
    until grep -qs listens "$name.out"; do
        kill -0 "$(cat "$name.pid")" || { cat "$name.err" >&2; exit 1; }
        sleep 0.05
    done
    port=$(sed -n 's|.*http://127.0.0.1:\([0-9]*\) .*|\1|p' "$name.out")
    mkdir "$name"
    printf 'connect-to = "localhost:3000:127.0.0.1:%s"\nmax-time = 60\n' "$port" >"$name/.curlrc"
}
start brooklet "$programs/brooklet" --listen 127.0.0.1:0 --log off
start minimal "$programs/brooklet-minimal" 127.0.0.1:0
echo 'programs-token both *' >tokens
start tenants "$programs/brooklet" --listen 127.0.0.1:0 --log off --tokens tokens

# A log of 9,999 lines, for the command that adds one and follows it.
seq 1 9999 | sed 's/.*/& a line, "quoted", with \\ and	tab/' >app.log

# Each command into N.sh, the server it is for into N.server, what it must print into N.expected.
awk '/^```console/ { on = 1; server = $2 ? $2 : "brooklet"; next }  /^```/ { on = 0 }
     on && /^\$ / { n++; print substr($0, 3) > (n ".sh"); print server > (n ".server"); printf "" > (n ".expected"); next }
     on { print > (n ".expected") }' "$readme"

ids() { sed -E 's/[0-9]{13}-[0-9]+/ID/g; s/[0-9]{16}/US/g; s/[0-9]{13}/MS/g'; }
same() { ids <"$1.expected" >want; head -n "$(wc -l <want)" "$1.out" | ids >got; cmp -s want got; }
# Waits until a command succeeds, for a minute at most.
await() {
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || return 1
        sleep 0.1
    done
}
log_came() { [ "$(grep -c '^data: ' log.out)" -ge 10000 ]; }
go_on() {
    timeout 60 sh "$1.sh" >"$1.out" 2>"$1.err" & # whose end is that of all it has started, tail too
    echo $! >"$1.pid"
}
fail_for() { echo "FAILED: $1" >&2; exit 1; }
fail() { diff want got >&2 || true; fail_for "$(cat "$1.sh")"; }

export CURL_HOME="$dir/brooklet"
curl -sN localhost:3000/events/log >log.out &
echo $! >log.pid
await [ -s log.out ] || fail_for 'the stream of the log does not begin'

passed=0
for script in $(ls ./*.sh | sort -t/ -k2n); do
    n=$(basename "$script" .sh)
    CURL_HOME=$dir/$(cat "$n.server")
    case $(cat "$script") in
    *'curl -N '*) # goes on until it is stopped, so what it has printed is looked at in the end
        go_on "$n"
        if grep -q events "$script"; then await [ -s "$n.out" ] || fail_for "$(cat "$script")"; fi ;;
    *'tail '*) # goes on, too; what follows is published after the log
        go_on "$n"
        await log_came || fail_for "$(cat "$script")" ;;
    *)
        sh "$script" >"$n.out" 2>"$n.err"
        same "$n" || fail "$n" ;;
    esac
    passed=$((passed + 1))
done
for pid in *.pid; do
    n=${pid%.pid}
    [ -f "$n.sh" ] || continue
    await same "$n" || fail "$n"
done
sed -n 's/^data: //p' log.out | cmp - app.log || fail_for 'the log did not arrive line for line'

# What --help shows works, too; a stream goes on until its time is over.
CURL_HOME=$dir/brooklet
"$programs/brooklet" --help | sed -n 's/^  curl \(.*[^ ]\)   .*/curl -f \1/p' >help
[ "$(wc -l <help)" -ge 5 ] || fail_for 'the examples of --help were not found'
while IFS= read -r command; do
    status=0
    timeout 2 sh -c "$command" >help.out 2>&1 </dev/null || status=$?
    [ $status = 0 ] || [ $status = 124 ] || { cat help.out >&2; fail_for "$command"; }
    passed=$((passed + 1))
done <help
echo "smoke: $passed passed, 0 failed"
