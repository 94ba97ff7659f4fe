"""A swarm for programs that speak OpenAI's HTTP: `peer gateway`.

server    the process: model, engine, uvicorn
app       `Gateway`: the endpoints
doors     who may ask: keys, and limits
requests  what may be asked for
chat      conversations to prompts
writing   a request's texts, from the engine's events
forms     texts to answers, at once or piece by piece
answers   the answers' fields
streams   Server-Sent Events; clients that go away
refusals  errors in OpenAI's form
metrics   what Prometheus reads

`engine/` makes the texts. What is here needs the packages of the extra `gateway`, and is imported by that command only.
"""
