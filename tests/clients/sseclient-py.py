# Python: sseclient-py over the standard library, which hands it lines as they come. (Over `requests` and `urllib3` it waits
# for more bytes than an event has.) It reads one answer and leaves reconnecting to its user, and it takes the half of an
# event at a cut for a whole one: with --whole, only what a blank line ended reaches it.
import http.client
import json
import sys
import time
import urllib.error
import urllib.request

import sseclient


def say(**what):
    print(json.dumps(what), flush=True)


class Whole:
    def __init__(self, lines):
        self.lines = lines

    def __iter__(self):
        block = []
        for line in self.lines:
            block.append(line)
            if line == b"\n":
                yield b"".join(block)
                block = []

    def close(self):
        self.lines.close()


url, whole = sys.argv[1], "--whole" in sys.argv
last_id, retry = None, 0.3
while True:
    headers = {"Last-Event-ID": last_id} if last_id else {}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
        for event in sseclient.SSEClient(Whole(answer) if whole else answer).events():
            say(type=event.event, id=event.id, data=event.data)
            last_id = event.id or last_id
            retry = int(event.retry) / 1000 if event.retry else retry
    except (OSError, urllib.error.URLError, http.client.HTTPException) as error:
        print(repr(error), file=sys.stderr)
    say(end=True)
    time.sleep(retry)
