# Python: requests-sse, which reconnects by itself, after twice the time that it was told. Of each line of data it takes all
# spaces at the beginning off, and of an event's data all line ends at the end.
import json
import sys
import time

import requests
from requests_sse import EventSource


def say(**what):
    print(json.dumps(what), flush=True)


last_id = None
while True:
    try:
        with EventSource(sys.argv[1], latest_event_id=last_id, timeout=60, on_error=lambda: say(end=True)) as source:
            for event in source:
                last_id = event.last_event_id
                say(type=event.type, id=last_id, data=event.data)
    except requests.RequestException as error:
        print(repr(error), file=sys.stderr)
        time.sleep(0.3)
