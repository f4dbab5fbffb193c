# Python: launchdarkly-eventsource, which reconnects by itself, in a time of its own.
import json
import sys

from ld_eventsource import SSEClient
from ld_eventsource.actions import Event, Fault
from ld_eventsource.config import ErrorStrategy, RetryDelayStrategy


def say(**what):
    print(json.dumps(what), flush=True)


client = SSEClient(
    sys.argv[1],
    initial_retry_delay=0.3,
    retry_delay_strategy=RetryDelayStrategy(),
    error_strategy=ErrorStrategy.always_continue(),
)
for action in client.all:
    if isinstance(action, Event):
        say(type=action.event, id=action.last_event_id, data=action.data)
    elif isinstance(action, Fault):
        print(repr(action.error), file=sys.stderr)
        say(end=True)
