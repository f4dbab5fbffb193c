# Python: requests and urllib3 as they are, with the spec's rules for reading a stream: python-http.py requests|urllib3 URL
import json
import sys
import time

import requests
import urllib3


def say(**what):
    print(json.dumps(what), flush=True)


def pieces(which, url, headers):
    if which == "requests":
        with requests.get(url, headers=headers, stream=True, timeout=60) as answer:
            yield from answer.iter_content(None)
    else:
        answer = urllib3.request("GET", url, headers=headers, preload_content=False, timeout=60, retries=False)
        try:
            yield from answer.stream(None)
        finally:
            answer.close()


def lines(pieces):
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line.decode() for line in whole)


which, url = sys.argv[1], sys.argv[2]
last_id, retry = "", 0.3
while True:
    headers = {"Last-Event-ID": last_id} if last_id else {}
    kind, data, new_id = "message", [], last_id
    try:
        for line in lines(pieces(which, url, headers)):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                kind = value
            elif field == "id":
                new_id = value
            elif field == "data":
                data.append(value)
            elif field == "retry":
                retry = int(value) / 1000
            elif line == "":
                last_id = new_id
                if data:
                    say(type=kind, id=last_id, data="\n".join(data))
                kind, data = "message", []
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        print(repr(error), file=sys.stderr)
    say(end=True)
    time.sleep(retry)
