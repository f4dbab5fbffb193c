#!/bin/sh
# Runs the doctor against the server, against an nginx that is right, and against one that is wrong in one way after the
# other, and asserts that it finds just that. All at once, since most of it is waiting.
set -u
cd "$(dirname "$0")/.." || exit
PATH=$PATH:/usr/sbin:/sbin
for tool in curl nginx; do
    command -v $tool >/dev/null && continue
    echo "test of the doctor left out: $tool is missing (make setup installs it)" >&2
    [ "${CI:-}" != true ]
    exit
done
unset URL ORIGIN TOKEN IDLE HEARTBEAT PATIENCE WATCH
export no_proxy='*'
brooklet=$PWD/target/release/brooklet
doctor=$PWD/tests/doctor.sh
dir=$(mktemp -d)
pids=''
# shellcheck disable=SC2086,SC2317 # a list of numbers; the trap calls it
leave() {
    [ -z "$pids" ] || kill $pids 2>/dev/null
    wait
    rm -rf "$dir"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
cd "$dir" || exit 1
mkdir tmp # where doctors keep their files
origin=https://app.example

fail() { echo "FAILED: $1" >&2; exit 1; }

wait_for() { # WHAT COMMAND...: until it succeeds, at most half a minute
    what=$1 tries=0
    shift
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -lt 300 ] || fail "waited in vain for $what"
        sleep 0.1
    done
}

# Two servers: one that sends heartbeats as soon as it can, one that sends none while the test runs.
allow=''
if "$brooklet" --help | grep -q -e --allow-origin; then allow="--allow-origin $origin"; fi
serve() { # NAME FLAGS...: sets port
    name=$1
    shift
    # shellcheck disable=SC2086 # two words or none
    "$brooklet" --listen 127.0.0.1:0 --log off $allow "$@" >"$name.server" &
    pids="$pids $!"
    wait_for "the server" grep -qs listens "$name.server"
    port=$(sed -n 's|.*http://127.0.0.1:\([0-9]*\) .*|\1|p' "$name.server")
}
serve beating --heartbeat 3500ms
beating=$port
serve silent --heartbeat 1h
silent=$port

# Each location is wrong in one way. A server that knows nothing of CORS gets it from nginx, but where it must be missing.
add='' hide='proxy_hide_header Access-Control-Allow-Origin;'
[ -n "$allow" ] || { add="add_header Access-Control-Allow-Origin $origin always;" hide='add_header X-None 1;'; }
write_config() {
    cat <<END
daemon off;
master_process off;
pid $dir/nginx.pid;
error_log $dir/nginx.log;
events { worker_connections 500; }
http {
    access_log off;
    client_body_temp_path $dir/body;
    proxy_temp_path $dir/proxy;
    fastcgi_temp_path $dir/fastcgi;
    uwsgi_temp_path $dir/uwsgi;
    scgi_temp_path $dir/scgi;
    server {
        listen 127.0.0.1:$nginx;
        client_max_body_size 64k;
        proxy_http_version 1.1;
        proxy_request_buffering off;
        $add
        location = /alive { return 200 "$dir"; }
        location /right/ {
            proxy_pass http://127.0.0.1:$beating/;
            proxy_buffering off;
            proxy_read_timeout 1h;
        }
        location /buffering/ { # what comes in chunks, nginx passes on all the same
            proxy_pass http://127.0.0.1:$beating/;
            proxy_http_version 1.0;
            proxy_buffering on;
            proxy_ignore_headers X-Accel-Buffering;
        }
        location /gzip/ {
            proxy_pass http://127.0.0.1:$beating/;
            gzip on;
            gzip_types text/event-stream;
        }
        location /gzip-buffering/ {
            proxy_pass http://127.0.0.1:$beating/;
            proxy_http_version 1.0;
            gzip on;
            gzip_types text/event-stream;
            proxy_buffering on;
            proxy_ignore_headers X-Accel-Buffering;
        }
        location /compressor/ { # holds back what it compresses, and only that
            if (\$http_accept_encoding ~ gzip) { rewrite ^/compressor/(.*) /gzip-buffering/\$1 last; }
            rewrite ^/compressor/(.*) /right/\$1 last;
        }
        location /idle/ {
            proxy_pass http://127.0.0.1:$silent/;
            proxy_read_timeout 2s;
        }
        location /last-event-id/ {
            proxy_pass http://127.0.0.1:$beating/;
            proxy_set_header Last-Event-ID "";
        }
        location /no-cors/ {
            proxy_pass http://127.0.0.1:$beating/;
            $hide
        }
        location /cors-twice/ {
            proxy_pass http://127.0.0.1:$beating/;
            add_header Access-Control-Allow-Origin $origin always;
            add_header Access-Control-Allow-Origin $origin always;
        }
        location /body/ {
            proxy_pass http://127.0.0.1:$beating/;
            client_max_body_size 1k;
        }
        location /put/ {
            proxy_pass http://127.0.0.1:$beating/;
            proxy_request_buffering on;
        }
        location /cache/ {
            proxy_pass http://127.0.0.1:$beating/;
            proxy_hide_header Cache-Control;
            add_header Cache-Control max-age=60;
        }
        location /read-only/ {
            proxy_pass http://127.0.0.1:$beating/;
            limit_except GET OPTIONS { deny all; }
        }
        location /token/ {
            if (\$http_authorization != 'Bearer quo"ted') { return 401; }
            proxy_pass http://127.0.0.1:$beating/;
        }
        location /page/ {
            default_type text/html;
            return 200 "<!doctype html>";
        }
        location /redirect/ { return 301 http://127.0.0.1:$nginx/right/events/x; }
        location /nothing/ { proxy_pass http://127.0.0.1:$beating; }
        location /down/ { proxy_pass http://unix:$dir/nobody.socket:/; }
        location /away/ {
            proxy_pass http://unix:$dir/nobody.socket:/;
            error_page 502 503 504 = @away;
        }
        location @away {
            if (\$request_method != GET) { return 502; }
            default_type text/event-stream;
            return 200 "retry: 2000\n\n";
        }
    }
}
END
}
# nginx cannot say which free port it was given, so ports are tried until it has one.
serves() { [ "$(curl -qs -m 10 "http://127.0.0.1:$nginx/alive")" = "$dir" ]; }
serves_or_gave_up() { serves || ! kill -0 "$nginx_pid" 2>/dev/null; }
nginx=$((20000 + $$ % 10000))
for attempt in 1 2 3 4 5 6 7 8; do
    nginx=$((nginx + attempt * 7))
    write_config >nginx.conf
    nginx -e "$dir/nginx.log" -c "$dir/nginx.conf" 2>nginx.err &
    nginx_pid=$!
    wait_for nginx serves_or_gave_up
    serves && break
done
serves || fail "nginx did not start: $(cat nginx.log)"
pids="$pids $nginx_pid"

# Starts a doctor. What is good is given all the time that a slow machine may need.
cases='' doctors=''
start() { # NAME URL SETTINGS...
    name=$1 url=$2
    shift 2
    cases="$cases $name"
    (
        env TMPDIR="$dir/tmp" IDLE=0 PATIENCE=25 URL="$url" "$@" sh "$doctor" >"$name.out" 2>"$name.err"
        echo $? >"$name.status"
    ) &
    doctors="$doctors $!"
}

proxy=http://127.0.0.1:$nginx
start bare "http://127.0.0.1:$beating" IDLE=8 HEARTBEAT=4
start right "$proxy/right" IDLE=8 HEARTBEAT=4 ORIGIN=$origin
start buffering "$proxy/buffering/" PATIENCE=2
start gzip "$proxy/gzip"
start gzip-buffering "$proxy/gzip-buffering" PATIENCE=2
start compressor "$proxy/compressor" PATIENCE=8
start idle "$proxy/idle" IDLE=30
start no-heartbeat "http://127.0.0.1:$silent" IDLE=3 HEARTBEAT=1
start last-event-id "$proxy/last-event-id"
start no-cors "$proxy/no-cors" ORIGIN=$origin
start cors-twice "$proxy/cors-twice" ORIGIN=$origin
start body "$proxy/body"
start put "$proxy/put" PATIENCE=8
start cache "$proxy/cache"
start read-only "$proxy/read-only"
start no-token "$proxy/token"
start token "$proxy/token" TOKEN='quo"ted'
start page "$proxy/page"
start redirect "$proxy/redirect"
start nothing "$proxy/nothing"
start down "$proxy/down"
start nobody http://127.0.0.1:1
start watch-down "$proxy/down" WATCH=2
start watch-away "$proxy/away" WATCH=2
start watch-nobody http://127.0.0.1:1 WATCH=1
start usage ''
start usage-origin "$proxy" ORIGIN=$origin/
start usage-number "$proxy" IDLE=1m

# Ctrl-C while it waits: nothing may be left.
env --default-signal=INT TMPDIR="$dir/tmp" IDLE=600 URL="http://127.0.0.1:$silent" sh "$doctor" >stopped.out 2>&1 &
stopped=$!
wait_for 'the last check before the wait' grep -qs '^info cors' stopped.out
kill -INT $stopped
wait $stopped
[ $? -eq 130 ] || fail "Ctrl-C: status $? instead of 130"
# shellcheck disable=SC2086 # a list of numbers
wait $doctors

# What each must have found, and nothing else: the levels and keys of all lines that are neither ok nor information.
passed=0
found() { # NAME STATUS FINDINGS [TEXT-OF-THE-FINDING]
    cases=$(echo "$cases " | sed "s/ $1 / /")
    got=$(sed -n 's/^\(warn\|FAIL\) *\([a-z]*\): .*/\1 \2/p' "$1.out" | paste -sd, -)
    if [ "$(cat "$1.status")" != "$2" ] || [ "$got" != "$3" ] || ! cat "$1.out" "$1.err" | grep -qF -e "${4:-}"; then
        cat "$1.out" "$1.err" >&2
        fail "$1: status $(cat "$1.status") instead of $2, found '$got' instead of '$3', or no word of: ${4:-}"
    fi
    passed=$((passed + 1))
}
all() { # NAME LINES: every line, so that nothing was left out
    got=$(sed -n 's/^\([a-zA-Z]*\) *\([a-z]*\): .*/\1 \2/p' "$1.out" | paste -sd, -)
    [ "$got" = "$2" ] || { cat "$1.out" >&2; fail "$1: the lines are '$got' instead of '$2'"; }
}

found bare 0 ''
all bare 'ok reach,info http,ok cache,ok buffering,ok compression,ok put,ok resume,ok body,info cors,ok idle,info restart'
found right 0 '' 'the answer to OPTIONS allows'
all right 'ok reach,info http,ok cache,info accel,ok buffering,ok compression,ok put,ok resume,ok body,'\
'ok cors,ok preflight,ok idle,info restart'
# shellcheck disable=SC2016 # the backquotes are what it prints
{
    found buffering 1 'FAIL buffering' '`proxy_buffering off;`'
    found gzip 0 'warn compression' '`gzip off;`'
    found gzip-buffering 1 'FAIL buffering,warn compression' '`gzip off;`'
    found compressor 1 'FAIL compression' 'gzip: events stay in the compressor'
    found idle 1 'FAIL idle' '`proxy_read_timeout 1h;`'
    found no-heartbeat 0 'warn idle' 'no heartbeat came through'
    found last-event-id 1 'FAIL resume' '`proxy_set_header Last-Event-ID`'
    found no-cors 1 'FAIL cors,FAIL preflight' '`proxy_hide_header`'
    found cors-twice 1 'FAIL cors,FAIL preflight' 'more than once'
    found body 1 'FAIL body' '`client_max_body_size 64k;`'
    found put 0 'warn put' '`proxy_request_buffering off;`'
    found cache 0 'warn cache' 'Cache-Control is max-age=60'
    found read-only 1 'FAIL publish' '(nginx `limit_except`)'
    found no-token 1 'FAIL reach' 'Give TOKEN='
    found token 0 '' 'with the token'
    found page 1 'FAIL type' 'text/html'
    found redirect 1 'FAIL reach' "301 leads to $proxy/right:"
    found nothing 1 'FAIL reach' '404 (there is nothing at'
    found down 1 'FAIL reach' '502 from nginx'
    found nobody 1 'FAIL reach' 'connect to 127.0.0.1 port 1'
    found watch-down 1 'FAIL restart' 'nginx `error_page`'
    found watch-away 0 '' 'times 200'
    found watch-nobody 1 'FAIL restart' 'no answer'
    found usage 2 '' 'usage: make doctor URL='
    found usage-origin 2 '' 'ORIGIN is'
    found usage-number 2 '' "'1m'"
}
[ -z "$(echo "$cases" | tr -d ' ')" ] || fail "nobody looked at:$cases"

# After all of them, and the one that was stopped: no file, no open stream.
[ -z "$(ls tmp)" ] || fail "files were left: $(ls tmp/*)"
no_streams() { curl -qs "http://127.0.0.1:$1/metrics" | grep -q '^brooklet_subscribers 0$'; }
wait_for 'the streams to be closed' no_streams "$silent"
wait_for 'the streams to be closed' no_streams "$beating"
echo "doctor: $passed passed, 0 failed"
