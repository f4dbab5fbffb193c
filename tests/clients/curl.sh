#!/bin/sh
# curl, and the spec's rules for reading a stream in shell: curl.sh URL STATE-FILE
id='' retry=0.3 cr=$(printf '\r')
# One JSON string, of a line without control characters but tabs.
quoted() { printf '%s' "$1" | sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/	/\\t/g'; }

while :; do
    curl --silent --no-buffer ${id:+--header "Last-Event-ID: $id"} "$1" | {
        type='' data='' has_data=''
        while IFS= read -r line; do
            line=${line%"$cr"}
            value=${line#*:} value=${value# }
            case $line in
            id:*) id=$value ;;
            event:*) type=$value ;;
            retry:*) retry=$((value / 1000)).$(printf %03d $((value % 1000))) ;;
            data:*) data=$data${has_data:+'\n'}$(quoted "$value") has_data=1 ;;
            '')
                if [ -n "$has_data" ]; then
                    printf '{"type":"%s","id":"%s","data":"%s"}\n' "$(quoted "${type:-message}")" "$id" "$data"
                fi
                # The state outlives the pipe in a file: a pipe's end has no other way to tell.
                printf '%s %s\n' "$id" "$retry" >"$2"
                type='' data='' has_data='' ;;
            esac
        done
    }
    echo '{"end":true}'
    if [ -s "$2" ]; then read -r id retry <"$2"; fi
    sleep "$retry"
done
