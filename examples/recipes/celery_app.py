"""Celery: tasks that ask; a worker of threads shares one model, and prefork has one in each process.

Run it in ``examples/recipes``, with Redis or another broker in ``BROKER`` and ``RESULTS``::

    celery -A celery_app worker --pool threads --concurrency 32
    python -c 'from celery_app import ask; print(ask.delay("What is the capital of France?").get())'
"""

import os

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown, worker_shutdown

from lmbridge import Bridge, LMBridgeError

app = Celery(
    "celery_app",
    broker=os.environ.get("BROKER", "redis://localhost"),
    backend=os.environ.get("RESULTS", "redis://localhost"),
)
bridge = Bridge("demo")  # built here, loaded where a task runs


@app.task(bind=True, max_retries=3)
def ask(task, prompt):
    try:
        return bridge.infer(prompt, timeout=60).text
    except LMBridgeError as error:
        if error.retryable:
            raise task.retry(exc=error, countdown=2) from error
        raise


@worker_process_init.connect
def load(**about):  # prefork: in each child, after the fork, rather than with its first task
    bridge.start()


@worker_process_shutdown.connect
@worker_shutdown.connect
def close(**about):
    bridge.close()
