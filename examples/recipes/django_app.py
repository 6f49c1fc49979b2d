"""Django: a view that asks and one that streams, on WSGI and on ASGI.

Run it with ``python examples/recipes/django_app.py runserver`` and ask::

    curl 'http://127.0.0.1:8000/ask?prompt=What+is+the+capital+of+France?'
    curl -N 'http://127.0.0.1:8000/tell?prompt=Tell+me+a+story+about+an+owl.'
"""

import sys
from itertools import chain

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.http import JsonResponse, StreamingHttpResponse
from django.urls import path
from django.utils.deprecation import MiddlewareMixin

from lmbridge import Bridge, InvalidRequestError, LMBridgeError, QueueFullError, RequestTimeoutError

settings.configure(
    DEBUG=True,
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    MIDDLEWARE=[f"{__name__}.Refusals"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="example",
)

STATUS = {InvalidRequestError: 400, QueueFullError: 429, RequestTimeoutError: 504, LMBridgeError: 503}

bridge = Bridge("demo")  # in a project: a module of its own; it loads at the first request, in the process that serves


class Refusals(MiddlewareMixin):
    def process_exception(self, request, error):
        if isinstance(error, LMBridgeError):
            status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
            return JsonResponse({"error": error.message}, status=status)


def ask(request):
    return JsonResponse({"text": bridge.infer(request.GET.get("prompt", ""), timeout=60).text})


def tell(request):  # on WSGI: runserver, gunicorn
    stream = bridge.stream(request.GET.get("prompt", ""), timeout=60)
    first = next(stream)
    if first.error:  # raised here, it still gives the response its status
        raise first.error
    texts = (delta.text for delta in chain([first], stream))
    return StreamingHttpResponse(texts, content_type="text/plain; charset=utf-8")


async def tell_async(request):  # on ASGI: uvicorn, daphne
    stream = bridge.astream(request.GET.get("prompt", ""), timeout=60)
    first = await anext(stream)
    if first.error:
        raise first.error

    async def texts():
        yield first.text
        async for delta in stream:
            yield delta.text

    return StreamingHttpResponse(texts(), content_type="text/plain; charset=utf-8")


urlpatterns = [path("ask", ask), path("tell", tell), path("tell-async", tell_async)]

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
else:
    application = get_wsgi_application()  # gunicorn -k gthread --threads 64 django_app:application
    asgi = get_asgi_application()  # uvicorn django_app:asgi
