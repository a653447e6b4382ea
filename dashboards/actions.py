"""Acting on the pipeline over HTTP: each request becomes events, and each action is recorded in an audit stream.

GET  /api/dead              200 {"channels": {NAME: {"open": n, "groups": {GROUP: n}, "reasons": {REASON: n}}}}
GET  /api/dead?channel=…    [&group= &reason= &limit=100 &tensors=false]
                            200 {"channel", "open": n, "letters": [LETTER, …]}, the newest first
POST /api/dead/replay       {"channel", "ids"?, "group"?, "reason"?, "all"?}        200 {"settled": n, "gone": n}
POST /api/dead/drop         the same                                                the same

POST /api/groups/pause      {"channel", "group"}                                  200 {"paused": true, "changed": bool}
POST /api/groups/resume     {"channel", "group"}                                  200 {"paused": false, "changed": bool}

GET  /api/publishers        200 {NAME: {"rate", "initial", "workers": {WORKER: {"rate", "initial"}}}}
POST /api/publishers/rate   {"publisher", "rate"}                                   202 {"id"}

GET  /api/models            200 {NAME: {"version", "source", "workers": {WORKER: {"version", "state", "reason"}},
                                 "history": [{"version", "source", "time"}, …],
                                 "previous": {"version", "source"} | null}}
POST /api/models/load       {"model", "version", "source"}                          202 {"id"}
POST /api/models/rollback   {"model"}                                               202 {"id", "version", "source"}

GET  /api/runs              200 [{"run", "id", "time", "state", "reason", "plan": {…}}, …], the newest first
POST /api/runs/start        {"run"?, "mode"?, "workers"?, "rounds"?, "learning_rate"?, "batch"?, "rate"?, "seed"?}
                            202 {"id", "run"}

GET  /api/schemas           200 [{"channel", "type", "durable"}, …]: what may be published to
GET  /api/schemas?channel=… 200 {"channel", "type", "durable", "schema"}
POST /api/events            {"channel", "event", "key"?, "delay"?}                  202 {"id"}

GET  /api/audit             [?since=1h &limit=200]
                            200 [{"id", "time", "who", "address", "action", "subject", "parameters", "outcome",
                            "detail"}, …], the newest first
GET  /api/markers           [?since=UNIX SECONDS]
                            200 [{"time", "kind", "text", "subject"}, …], the oldest first; see markers.py

LETTER   {"id", "time", "channel", "group", "partition", "origin", "event_id", "key", "attempts", "reason", "traceback",
         "count", "events": [the payload, …] or null where nobody can read it}; tensors as "<float32 [8, 8]>", with
         tensors=true as {"dtype", "shape", "data": base64}. `reason` in queries: a part of the reason, in any case.
which    Of a channel's letters `ids` picks some, `group` and `reason` those that fit, all three together what fits all;
         "all": true, alone, means every one. A letter is settled once, however often one asks: `settled` counts what
         this call did, `gone` those of `ids` that were settled before, or are too old.
rate     Events a second and process; 0 holds a publisher until the next rate; null: as fast as it goes. It lasts until
         the process ends. Publishers without a PublisherRate cannot be set.
source   A specification within the workers' PIPELINE_MODELS_DIR or a built-in model; "": what they were started with.
         `previous` is where a roll-back goes: what was served before the newest load that was not refused.
state    waiting (no launcher has it yet), started, finished, failed, stopped (taken up again by the next launcher).
event    A JSON object as the schema says, tensors as nested lists or {"dtype", "shape", "data"}; for `str` and `bytes`
         channels a string. It is checked as `pipeline publish` checks it.

Errors are {"error": "what is wrong and what to do"}; 422 has "fields" beside it: {"sensor": "…", "window.0": "…",
"": "…"}, a reason for each place in the input (in the event, for /api/events).

401  a token is set, and it was not given (Authorization: Bearer …, or the cookie of /?token=…)
403  from a page of another origin; no token is set and the request is not from this machine; a channel of the framework
404  no such channel, group, publisher, model
409  nothing to roll back to; a run of that name is under way; a live channel's group (nothing waits there)
413  more than 8 MiB                                415  a POST that is not application/json
422  not as the table says                          503  Redis does not answer

Who may act. With a token (PIPELINE_TOKEN): who has it, from anywhere. Without: only who sits at the machine: the
connection comes from a loopback address, was made to a loopback name (a page on the internet can point its own name at
127.0.0.1) and passed no proxy (X-Forwarded-For, Forwarded); so a dashboard that is bound elsewhere and has no token
shows everything and lets nobody from outside act. In both cases pages of other origins are refused.
"""

from __future__ import annotations
