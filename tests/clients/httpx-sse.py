# Python: httpx-sse, which reads one answer and leaves reconnecting to its user. It hands over blocks without data, too.
import json
import sys
import time

import httpx
from httpx_sse import connect_sse


def say(**what):
    print(json.dumps(what), flush=True)


last_id, retry = None, 0.3
with httpx.Client(timeout=60) as client:
    while True:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        try:
            with connect_sse(client, "GET", sys.argv[1], headers=headers) as source:
                for event in source.iter_sse():
                    say(type=event.event, id=event.id, data=event.data)
                    last_id = event.id or last_id
                    retry = retry if event.retry is None else event.retry / 1000
        except httpx.TransportError as error:
            print(repr(error), file=sys.stderr)
        say(end=True)
        time.sleep(retry)
