# Python: sseclient-py over requests, as it is meant. It reads one answer and leaves reconnecting to its user.
import json
import sys
import time

import requests
import sseclient


def say(**what):
    print(json.dumps(what), flush=True)


last_id, retry = None, 0.3
while True:
    headers = {"Last-Event-ID": last_id} if last_id else {}
    try:
        with requests.get(sys.argv[1], headers=headers, stream=True, timeout=60) as answer:
            for event in sseclient.SSEClient(answer).events():
                say(type=event.event, id=event.id, data=event.data)
                last_id = event.id or last_id
                retry = int(event.retry) / 1000 if event.retry else retry
    except requests.RequestException as error:
        print(repr(error), file=sys.stderr)
    say(end=True)
    time.sleep(retry)
