#!/bin/sh
# Tells an operator what stands between browsers and the server (reverse proxy, load balancer, CDN) does to the streams:
# one line for each finding, with what was seen and what to change. It publishes to its own topic, with a random name.
# Exit status: 0 nothing failed, 1 something did, 2 wrong usage.
set -u

usage() {
    [ $# -eq 0 ] || echo "doctor: $1" >&2
    cat >&2 <<'END'
usage: make doctor URL=http://HOST[:PORT][/PREFIX], where URL/events/NAME is a stream; and, as wanted,
  ORIGIN=https://app.example   may a page from there read the stream (CORS)?
  TOKEN=SECRET                 sent as "Authorization: Bearer SECRET"; also from the environment
  IDLE=70                      how many seconds a silent stream is watched; 0: not at all
  HEARTBEAT=15                 the server's --heartbeat in seconds
  PATIENCE=5                   after how many seconds an event is late
  WATCH=30                     instead of all that: so many seconds, while you restart the server, what do browsers get?
END
    exit 2
}

URL=${URL:-} ORIGIN=${ORIGIN:-} TOKEN=${TOKEN:-} WATCH=${WATCH:-0}
IDLE=${IDLE:-70} HEARTBEAT=${HEARTBEAT:-15} PATIENCE=${PATIENCE:-5}
[ -n "$URL" ] || usage
case $URL in
*[[:space:]?#]*) usage "URL must have no spaces, no ? and no #" ;;
http://?* | https://?*) URL=${URL%/} ;;
*) usage "URL must begin with http:// or https://" ;;
esac
for number in "$IDLE" "$HEARTBEAT" "$PATIENCE" "$WATCH"; do
    case $number in
    '' | *[!0-9]* | 0?* | ??????*) usage "'$number' is not a whole number of seconds" ;;
    esac
done
case ${ORIGIN#*://} in
*[/[:space:]]*) usage "ORIGIN is scheme, host and port, without a path or a slash at the end" ;;
esac
case $TOKEN in
*[![:graph:]]*) usage "TOKEN must have no spaces" ;;
esac
command -v curl >/dev/null || usage 'curl is missing (Debian: apt-get install curl)'

dir=$(mktemp -d) || exit 1
pids='' shown='' failed=0 warned=0 held=''
# shellcheck disable=SC2317 # the trap calls it
leave() {
    # shellcheck disable=SC2086 # a list of numbers
    [ -z "$pids" ] || kill $pids 2>/dev/null
    rm -rf "$dir"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
trap '' PIPE # a PUT that is refused must not end everything

topic=doctor-$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
stream=$URL/events/$topic

# curl's options stand in files, since every user of the machine may read the arguments of a program.
printf '%s\n' silent show-error no-buffer globoff suppress-connect-headers >"$dir/without-token"
{
    cat "$dir/without-token"
    [ -z "$TOKEN" ] || printf 'header = "Authorization: Bearer %s"\n' "$(printf %s "$TOKEN" | sed 's/[\\"]/\\&/g')"
} >"$dir/with-token"
options=$dir/with-token

finding() { # LEVEL KEY TEXT...
    progress ''
    case $1 in
    warn) warned=$((warned + 1)) ;;
    FAIL) failed=$((failed + 1)) ;;
    esac
    printf '%-4s %s:' "$1" "$2"
    shift 2
    printf ' %s' "$@"
    echo
}

finish() {
    if [ "$failed" -gt 0 ]; then
        echo "$failed failed, $warned to be looked at"
        exit 1
    elif [ "$warned" -gt 0 ]; then
        echo "nothing failed, $warned to be looked at"
    else
        echo 'nothing failed'
    fi
    exit 0
}

progress() { # on a terminal, one line that is written over and over
    [ -t 2 ] && [ -n "$1$shown" ] && printf '\r\033[K%s' "$1" >&2
    shown=$1
}

# Milliseconds, or whole seconds where date knows nothing finer.
ms() {
    now=$(date +%s%3N)
    case $now in
    *[!0-9]*) now=$(date +%s)000 ;;
    esac
    echo "$now"
}

# One request, to its end. Sets code, version, moved (where a redirect leads) and type; leaves NAME.head and NAME.out.
ask() { # NAME CURL-ARGUMENTS...
    name=$1 code=000 version='' moved='' type=''
    shift
    : >"$dir/$name.head"
    : >"$dir/$name.out"
    curl -q -K "$options" -m $((PATIENCE + 10)) -D "$dir/$name.head" -o "$dir/$name.out" \
        -w '%{http_code}\n%{http_version}\n%{redirect_url}\n%{content_type}\n' "$@" >"$dir/meta" 2>"$dir/$name.err"
    { read -r code; read -r version; read -r moved; read -r type; } <"$dir/meta"
}

publish() { # FILE, as one event
    ask post -H 'Content-Type: text/plain' -H 'Expect:' --data-binary "@$1" "$stream"
    [ "$code" = 200 ] && grep -q '^[0-9]*-[0-9]*$' "$dir/post.out"
}

# Opens a stream and lets it run. When it ends, NAME.end says how many seconds it was open.
listen() { # NAME CURL-ARGUMENTS...
    name=$1
    shift
    for file in head out end err; do : >"$dir/$name.$file"; done
    curl -q -K "$options" -m $((IDLE + 600)) -D "$dir/$name.head" -o "$dir/$name.out" -w '%{time_total}' "$@" \
        >"$dir/$name.end" 2>"$dir/$name.err" 3>&- &
    pids="$pids $!"
}

# Waits until a line has come on a stream of the topic, at most PATIENCE; it took $took milliseconds. A stream that is
# cut meanwhile is opened anew, as browsers do: how long streams last is another finding.
arrives() { # NAME LINE CURL-ARGUMENTS...
    wanted=$1 line=$2
    shift 2
    began=$(ms)
    until grep -q "$line" "$dir/$wanted.out"; do
        took=$(($(ms) - began))
        [ "$took" -lt $((PATIENCE * 1000)) ] || return 1
        sleep 0.05
        if [ -s "$dir/$wanted.end" ] && ! grep -q "$line" "$dir/$wanted.out"; then
            sleep 0.3
            listen "$wanted" "$@" "$stream?since=earliest"
        fi
    done
    took=$(($(ms) - began))
}

header() { # FIELD NAME
    awk -v field="$1:" '
        tolower(substr($0, 1, length(field))) == tolower(field) { print substr($0, length(field) + 1) }
    ' "$dir/$2.head" | plain
}

plain() { # what others wrote, as one short line that is safe on a terminal
    tr -s ' \t\n' ' ' | tr -cd '[:print:]' | cut -c 1-100 | sed 's/^ //; s/ $//'
}

answered() { # NAME: the status, and what a refusal says in plain text
    case $type in
    text/plain*) echo "$code ($(plain <"$dir/$1.out"))" ;;
    *) echo "$code" ;;
    esac
}

farewell() { # NAME: why the server ended the stream, if it was the server
    sed -n 's/^: \(.\)/\1/p' "$dir/$1.out" | tail -n 1 | plain
}

# Is there a stream at all? A poll is one that ends at once, so it comes through where open streams are held back.
reach() {
    ask poll -H 'Accept-Encoding: gzip, deflate, br, zstd' "$stream?poll=1ms"
    server=$(header Server poll)
    case $code in
    200)
        case $type in
        text/event-stream*) return ;;
        esac
        finding FAIL type "${type:-no Content-Type} instead of text/event-stream, browsers give up for good on that:" \
            "let the proxy keep it, and serve no page of its own under /events/" ;;
    000) finding FAIL reach "no answer: $(plain <"$dir/poll.err")" ;;
    30?) finding FAIL reach "$code leads to ${moved%%/events/*}: give that as URL, and to pages and publishers" \
            "(a redirected POST may lose its body)" ;;
    401 | 403)
        if [ -n "$TOKEN" ]; then
            finding FAIL reach "$(answered poll): is TOKEN right, and does the proxy pass Authorization on?"
        else
            finding FAIL reach "$(answered poll): is a token needed? Give TOKEN=…"
        fi ;;
    404) finding FAIL reach "$(answered poll): does the proxy strip the prefix?" \
            "nginx does so by the slash at the end of \`proxy_pass http://…/;\`" ;;
    502 | 503 | 504) finding FAIL reach "$(answered poll) from ${server:-the proxy}: it does not reach the server" ;;
    *) finding FAIL reach "$(answered poll): browsers give up for good on anything but 200" ;;
    esac
    finish
}

heads() {
    chunked=$(header Transfer-Encoding poll)
    finding ok reach "200 from ${server:-the server}, text/event-stream${chunked:+, $chunked}${TOKEN:+, with the token}"
    case $version in
    1.1) finding info http "HTTP/1.1: a browser opens six streams to this host at most; HTTP/2 lifts that" ;;
    1*) finding info http "HTTP/$version: streams pass, but every request needs a connection of its own" ;;
    *) finding info http "HTTP/$version: a browser's streams share one connection" ;;
    esac
    cache=$(header Cache-Control poll)
    case $cache in
    *no-store*no-transform*) finding ok cache "Cache-Control: $cache" ;;
    *) finding warn cache "Cache-Control is ${cache:-gone}, not no-store, no-transform:" \
            "nginx no \`expires\` and no \`add_header Cache-Control\`, HAProxy no \`set-header\` for it" ;;
    esac
    [ -n "$(header X-Accel-Buffering poll)" ] ||
        finding info accel "X-Accel-Buffering is gone (nginx takes it): one further out needs \`proxy_buffering off;\`"
}

# One event at a time, the next only when the last has come.
delivery() {
    listen plain "$stream?since=earliest"
    if curl --version | grep -q libz; then listen packed --compressed "$stream?since=earliest"; fi
    arrives plain '^id:' || held=yes
    least=$((PATIENCE * 1000)) most=0 first=''
    for number in 1 2 3 4 5; do
        printf 'doctor %s' "$number" >"$dir/event"
        if ! publish "$dir/event"; then
            case $code in
            401 | 403) hint="is a token needed (TOKEN=…), or does the proxy refuse POST (nginx \`limit_except\`)?" ;;
            405) hint='let the proxy pass POST on' ;;
            000) hint=$(plain <"$dir/post.err") ;;
            *) hint='so nothing can be said about delivery' ;;
            esac
            finding FAIL publish "a POST was answered $(answered post): $hint"
            return 1
        fi
        [ -n "$first" ] || first=$(cat "$dir/post.out")
        if [ -n "$held" ] || ! arrives plain "^data: doctor $number\$"; then
            held_back || return 1
            break
        fi
        [ "$took" -ge "$least" ] || least=$took
        [ "$took" -le "$most" ] || most=$took
    done
    length=$(header Content-Length plain)
    if [ -n "$length" ]; then
        finding FAIL length "a stream came with Content-Length: $length, and ends there:" \
            "let the proxy pass it on as it comes, and not put a length on it"
    fi
    # Each was waited for, so a proxy that flushes once in a while has delayed all of them, a slow machine only some.
    if [ -n "$held" ]; then
        :
    elif [ "$least" -gt 500 ]; then
        finding warn buffering "each of 5 events took $least to $most ms: something collects them; nginx" \
            "\`proxy_buffering off;\`, Caddy \`flush_interval -1\`, HAProxy \`option http-no-delay\`"
    else
        finding ok buffering "5 events came one by one, each within $most ms"
    fi
    return 0
}

held_back() { # and why; 1 where there is no more to look at
    held=yes
    ask again "$stream?since=earliest&poll=1ms"
    if [ "$(farewell again)" != 'the poll is over' ] && [ -n "$(farewell again)" ]; then
        finding FAIL stream "the server ends streams at once: $(farewell again)"
        return 1
    elif ! grep -q "^data: doctor $number\$" "$dir/again.out"; then
        finding FAIL buffering "event $number was published, but is not there:" \
            "does a cache answer, or several servers that do not know each other's events?"
    else
        what="event $number did not come"
        [ -s "$dir/plain.out" ] || what='not one byte of the stream came'
        finding FAIL buffering "$what within $PATIENCE s: nginx \`proxy_buffering off;\` and no" \
            "\`proxy_ignore_headers X-Accel-Buffering;\`, Caddy \`flush_interval -1\`"
    fi
}

# The stream that offers to unpack, beside the plain one; where streams are held back, the poll must tell.
compression() {
    encoding=$(header Content-Encoding poll) packed=''
    if [ -z "$held" ] && [ -e "$dir/packed.out" ]; then
        arrives packed "^data: doctor $number\$" --compressed && packed=came
        [ ! -s "$dir/packed.head" ] || encoding=$(header Content-Encoding packed)
    fi
    change="nginx \`gzip off;\`, Caddy no \`encode\`, HAProxy no \`compression type text/event-stream\`"
    if [ -z "$held$packed" ] && [ -e "$dir/packed.out" ]; then
        finding FAIL compression "${encoding:-with gzip offered}: events stay in the compressor: $change"
    elif [ -z "$encoding" ]; then
        finding ok compression 'none, though gzip was offered'
    else
        finding warn compression "$encoding despite no-transform, which costs memory for each stream: $change"
    fi
}

put() {
    mkfifo "$dir/lines"
    curl -q -K "$options" -m $((PATIENCE + 10)) -H 'Expect:' -T - "$stream" <"$dir/lines" >"$dir/put.out" 2>&1 &
    pids="$pids $!"
    exec 3>"$dir/lines"
    echo 'doctor line' >&3
    if arrives plain '^data: doctor line$'; then
        finding ok put 'a line of a PUT comes while the PUT goes on'
    elif [ -s "$dir/put.out" ]; then
        finding warn put "a PUT was answered: $(plain <"$dir/put.out")"
    else
        finding warn put "lines of a PUT are held back to its end:" \
            "nginx \`proxy_request_buffering off;\` with \`proxy_http_version 1.1;\`"
    fi
    exec 3>&-
}

# What a reconnecting browser says is one header. The parameter in its place tells a lost header from lost events.
resume() {
    publish "$dir/event" # so that something follows the first one even if that was the only one
    ask resumed -H "Last-Event-ID: $first" "$stream?poll=1ms"
    ask asked "$stream?poll=1ms&last_event_id=$first"
    if grep -q '^data: doctor' "$dir/resumed.out"; then
        finding ok resume "what followed a Last-Event-ID came: $(grep -c '^data: doctor' "$dir/resumed.out") events"
    elif grep -q '^data: doctor' "$dir/asked.out"; then
        finding FAIL resume "Last-Event-ID does not reach the server: nginx no \`proxy_set_header Last-Event-ID\`," \
            "Caddy no \`header_up -Last-Event-ID\`, HAProxy no \`del-header\` for it"
    else
        finding FAIL resume "nothing came after the id $first:" \
            "does a cache answer, or several servers that do not know each other's events?"
    fi
}

body() {
    head -c 65536 /dev/zero | tr '\0' x >"$dir/large"
    if publish "$dir/large"; then
        finding ok body 'a POST of 64 KiB passes'
    elif grep -q -e --body-bytes "$dir/post.out"; then
        finding ok body "the server's own limit is less than 64 KiB: $(plain <"$dir/post.out")"
    else
        finding FAIL body "a POST of 64 KiB got $(answered post)$(plain <"$dir/post.err"), the server would take it:" \
            "nginx \`client_max_body_size 64k;\`, Caddy \`request_body { max_size 64KiB }\`"
    fi
}

# Browsers want their page's origin or *, once. They send no token with a preflight.
cors() {
    if [ -z "$ORIGIN" ]; then
        finding info cors 'not checked: give ORIGIN=https://app.example, where the page comes from'
        return
    fi
    ask cors -H "Origin: $ORIGIN" "$stream?poll=1ms"
    allows cors 'the stream'
    options=$dir/without-token
    ask preflight -X OPTIONS -H "Origin: $ORIGIN" -H 'Access-Control-Request-Method: POST' \
        -H 'Access-Control-Request-Headers: content-type' "$stream"
    options=$dir/with-token
    case $code in
    2??) allows preflight 'the answer to OPTIONS' ;;
    *) finding FAIL preflight "OPTIONS was answered $(answered preflight), browsers want 200 or 204:" \
            "let the proxy pass it on, and ask for no token there" ;;
    esac
}

allows() { # KEY WHAT
    allow=$(header Access-Control-Allow-Origin "$1")
    case $allow in
    "$ORIGIN" | '*') finding ok "$1" "$2 allows $allow" ;;
    '') finding FAIL "$1" "$2 has no Access-Control-Allow-Origin: start the server with" \
            "\`--allow-origin $ORIGIN\`; nginx no \`proxy_hide_header\` for it" ;;
    *' '*) finding FAIL "$1" "$2 has Access-Control-Allow-Origin more than once:" \
            "let either the server or the proxy add it (nginx \`add_header\`)" ;;
    *) finding FAIL "$1" "$2 allows only $allow: start the server with \`--allow-origin $ORIGIN\`" ;;
    esac
}

# The silent stream was opened first of all; this waits for the rest of its time.
idle() {
    until [ -s "$dir/idle.end" ]; do
        open=$(($(date +%s) - opened_at))
        [ $open -lt "$IDLE" ] || break
        progress "a silent stream is open for $open of $IDLE s, heartbeats: $(grep -c '^:$' "$dir/idle.out")"
        sleep 0.5
    done
    beats=$(grep -c '^:$' "$dir/idle.out")
    lasted=$(cut -d. -f1 "$dir/idle.end")
    if [ -n "$lasted" ] && [ -n "$(farewell idle)" ]; then
        finding ok idle "the server itself ended the stream after $lasted s: $(farewell idle)"
    elif [ -n "$lasted" ] && [ "$beats" -eq 0 ]; then
        finding FAIL idle "cut after $lasted s without a heartbeat: nginx \`proxy_read_timeout 1h;\`," \
            "HAProxy \`timeout server 1h\`, or a server with a shorter --heartbeat"
    elif [ -n "$lasted" ]; then
        finding FAIL idle "cut after $lasted s despite $beats heartbeats: lift the limit on how long answers may take" \
            "(load balancers have one), HAProxy \`timeout client 1h\`"
    elif [ "$beats" -eq 0 ] && [ "$IDLE" -ge $((HEARTBEAT + 2)) ] && [ -z "$held" ]; then
        finding warn idle "open for $IDLE s, but no heartbeat came through: something takes comments out, or the" \
            "server's --heartbeat is more than $HEARTBEAT s (then give HEARTBEAT=…)"
    else
        finding ok idle "a silent stream stayed open for $IDLE s, heartbeats: $beats"
    fi
}

# What browsers get while the server is away. They come back after a lost connection, and give up for good on any answer
# but 200 with the right type.
watch() {
    echo "watching $URL for $WATCH s: restart the server now" >&2
    ends_at=$(($(date +%s) + WATCH)) last=''
    while :; do
        ask probe "$stream?poll=1ms"
        answer="$code ${type%%;*}"
        echo "$(date +%T) $answer" >>"$dir/answers"
        [ "$answer" = "$last" ] || echo "$(date +%T) $answer" | sed 's/ 000 .*/ no connection/' >&2
        last=$answer
        [ "$(date +%s)" -lt "$ends_at" ] || break
        sleep 1
    done
    well=$(grep -c ' 200 text/event-stream$' "$dir/answers")
    lost=$(grep -c ' 000 ' "$dir/answers")
    awk '$2 != "000" && $2 " " $3 != "200 text/event-stream" {
            key = $2 " " ($3 == "" ? "-" : $3)
            if (!count[key]++) from[key] = $1
            to[key] = $1
        }
        END { for (key in count) print key, count[key], from[key], to[key] }' "$dir/answers" >"$dir/stranding"
    while read -r code type count from to; do
        case $code in
        50?) hint="nginx \`error_page\`, Caddy \`handle_errors\` answering 200 with \`retry: 2000\`, see README" ;;
        200) hint="let the proxy serve no page in place of a stream" ;;
        401 | 403) hint="is a token needed? Give TOKEN=…" ;;
        *) hint="let the proxy answer 200, text/event-stream and \`retry: 2000\`" ;;
        esac
        finding FAIL restart "$code ($type) $count times from $from to $to, browsers give up for good on it: $hint"
    done <"$dir/stranding"
    if [ -s "$dir/stranding" ]; then
        return
    elif [ "$well" -eq 0 ]; then
        finding FAIL restart "no answer to any of $lost requests: $(plain <"$dir/probe.err")"
    else
        finding ok restart "$well times 200, $lost times no connection, and nothing else: browsers come back from both"
    fi
}

if [ "$WATCH" -gt 0 ]; then
    watch
    finish
fi
reach
if [ "$IDLE" -gt 0 ]; then
    [ -t 2 ] || echo "this takes $IDLE s, since a silent stream is watched" >&2
    opened_at=$(date +%s)
    listen idle "$stream-idle"
fi
heads
if delivery; then
    compression
    [ -n "$held" ] || put
    resume
    body
fi
cors
if [ "$IDLE" -gt 0 ]; then
    idle
else
    finding info idle 'not checked: give IDLE=70, a number of seconds'
fi
finding info restart 'not checked: run it again with WATCH=30, and restart the server meanwhile'
finish
