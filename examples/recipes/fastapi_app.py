"""FastAPI: endpoints that ask, as functions and as coroutines, and one that streams.

Run it with ``uvicorn --app-dir examples/recipes fastapi_app:app`` and ask::

    curl 'http://127.0.0.1:8000/ask?prompt=What+is+the+capital+of+France?'
    curl -N 'http://127.0.0.1:8000/tell?prompt=Tell+me+a+story+about+an+owl.'
"""

from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from lmbridge import Bridge, InvalidRequestError, LMBridgeError, QueueFullError, RequestTimeoutError

STATUS = {InvalidRequestError: 400, QueueFullError: 429, RequestTimeoutError: 504, LMBridgeError: 503}

bridge = Bridge("demo", max_pending=256, when_full="reject")


@asynccontextmanager
async def lifespan(app):
    bridge.start()  # loads before the first request
    yield
    bridge.close(drain=True, timeout=10)


app = FastAPI(lifespan=lifespan)


@app.exception_handler(LMBridgeError)
async def refuse(request, error):
    status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
    return JSONResponse({"error": error.message}, status)


@app.get("/ask")
async def ask(prompt: str):
    return {"text": (await bridge.ainfer(prompt, timeout=60)).text}


@app.get("/ask-in-a-thread")
def ask_in_a_thread(prompt: str):  # in one of Starlette's 40 threads
    return {"text": bridge.infer(prompt, timeout=60).text}


@app.get("/ask-while-there")
async def ask_while_there(prompt: str, request: Request):  # for long answers: nothing is generated for who has left
    stream = bridge.astream(prompt, timeout=60)
    async for _ in stream:
        if await request.is_disconnected():
            break
    return {"text": stream.response.text}


@app.get("/tell")
async def tell(prompt: str):
    stream = bridge.astream(prompt, timeout=60)
    first = await anext(stream)
    if first.error:  # raised here, it still gives the response its status
        raise first.error

    async def texts():
        yield first.text
        async for delta in stream:
            yield delta.text

    return StreamingResponse(texts(), media_type="text/plain; charset=utf-8")
