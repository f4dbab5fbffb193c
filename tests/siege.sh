#!/bin/sh
# Puts the crowds of slowhttptest before the server (slow heads, slow bodies, slow reading), with lowered limits and with
# the defaults, and asks it from other connections all the while: for its health, to publish, for a stream. Prints how many
# of these probes failed, and how long they took. SIEGE=short: a few seconds each, with lowered limits only.
set -eu
cd "$(dirname "$0")/.."
for program in curl slowhttptest; do
    if ! command -v "$program" >/dev/null; then
        echo "siege left out: $program is missing (\`make setup\` installs it)" >&2
        [ "${CI:-}" != true ]
        exit
    fi
done
brooklet=$PWD/target/release/brooklet
if [ "${SIEGE:-}" = short ]; then seconds=5 all='lowered'; else seconds=60 all='lowered default'; fi
dir=$(mktemp -d)
trap 'kill $(cat "$dir"/*.pid) 2>/dev/null || true; rm -rf "$dir"' EXIT
failed=0

# Ends when the crowd has gone. Each line of FILE: seconds, and the status, or why it failed.
probe() {
    kind=$1 file=$2
    while kill -0 "$crowd" 2>/dev/null; do
        case $kind in
        health) set -- "$url/health" ;;
        publish) set -- -d x "$url/events/calm" ;;
        # A stream takes the newest kept event, and ends; where streams are full, it is told when to come back.
        stream) set -- "$url/events/calm?since=earliest&poll=5s" ;;
        esac
        curl -s -o "$file.body" -m 10 -w '%{time_total} %{http_code} ' "$@" >>"$file" || true
        case $kind in
        stream) grep -qE '^data: x|^: no room' "$file.body" && echo ok >>"$file" || echo bad >>"$file" ;;
        *) echo ok >>"$file" ;;
        esac
        sleep 0.1
    done
}

report() {
    sort -n "$2" | awk -v what="$1" '
        { times[NR] = $1 } $2 != 200 || $3 != "ok" { bad++ }
        END { median = times[int((NR + 1) / 2)]
              printf "%-42s %5d probes, %d failed, median %.1f ms, longest %.1f ms\n", what, NR, bad, median * 1000, times[NR] * 1000
              exit NR < 10 || bad > 0 || median >= 1 }' || failed=$((failed + 1))
}

threads() { sed -n 's/^Threads:[[:space:]]*//p' "/proc/$server/status"; }

for limits in $all; do
    if [ "$limits" = lowered ]; then flags='--connections 100 --subscribers 100'; else flags=''; fi
    for mode in heads bodies answers streams; do
        rm -f "$dir/out" # of the server before
        # shellcheck disable=SC2086 # a list
        "$brooklet" --listen 127.0.0.1:0 --log info $flags >"$dir/out" 2>"$dir/log" &
        server=$!
        echo "$server" >"$dir/server.pid"
        until grep -qs listens "$dir/out"; do sleep 0.05; done
        url=$(sed -n 's|.*\(http://127.0.0.1:[0-9]*\) .*|\1|p' "$dir/out")
        head -c 60000 /dev/zero | tr '\0' x >"$dir/large"
        for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
            curl -s -o /dev/null --data-binary "@$dir/large" "$url/events/large"
        done
        curl -s -o /dev/null -d x "$url/events/calm"
        before=$(threads)
        case $mode in
        heads) set -- -H -u "$url/events/calm" -i 1 ;;
        bodies) set -- -B -u "$url/events/slow" -i 1 -s 60000 ;;
        answers) set -- -X -u "$url/" -k 10 -w 256 -y 512 -n 5 -z 32 ;;
        streams) set -- -X -u "$url/events/large?since=earliest" -w 256 -y 512 -n 5 -z 32 ;;
        esac
        slowhttptest "$@" -c 1000 -r 300 -l "$seconds" -p 5 >"$dir/slow" 2>&1 &
        crowd=$!
        echo "$crowd" >"$dir/crowd.pid"
        probes=''
        for kind in health publish stream; do
            : >"$dir/$kind"
            probe "$kind" "$dir/$kind" &
            probes="$probes $!"
        done
        # shellcheck disable=SC2086 # a list
        wait $probes
        wait "$crowd" || true
        for kind in health publish stream; do report "$limits limits, slow $mode: $kind" "$dir/$kind"; done
        tries=0
        while [ "$(threads)" -gt "$before" ] && [ $tries -lt 300 ]; do tries=$((tries + 1)) && sleep 0.1; done
        if [ $tries -ge 300 ]; then
            echo "FAILED: $(threads) threads after the crowd, $before before" >&2
            failed=$((failed + 1))
        fi
        kill "$server"
        wait "$server" || { echo "FAILED: the server ended with $?: $(tail -n 5 "$dir/log")" >&2; failed=$((failed + 1)); }
    done
done
[ "$failed" = 0 ] || { echo "siege: $failed failed" >&2; exit 1; }
echo 'siege: 0 failed'
