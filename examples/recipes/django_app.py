"""Django: a view that asks and one that streams, on WSGI and on ASGI.

Run it with ``python examples/recipes/django_app.py runserver`` and ask::

    curl 'http://127.0.0.1:8000/ask?prompt=What+is+the+capital+of+France?'
    curl -N 'http://127.0.0.1:8000/tell?prompt=Tell+me+a+story+about+an+owl.'
"""

import sys

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.http import JsonResponse, StreamingHttpResponse
from django.urls import path

from lmbridge import Bridge, InvalidRequestError

settings.configure(DEBUG=True, ALLOWED_HOSTS=["127.0.0.1", "localhost"], ROOT_URLCONF=__name__, SECRET_KEY="example")

bridge = Bridge("demo")  # in a project: a module of its own; it loads at the first request, in the process that serves


def ask(request):
    try:
        return JsonResponse({"text": bridge.infer(request.GET.get("prompt", ""), timeout=60).text})
    except InvalidRequestError as error:
        return JsonResponse({"error": str(error)}, status=400)


def tell(request):  # on WSGI: runserver, gunicorn
    stream = bridge.stream(request.GET.get("prompt", ""), timeout=60)
    return StreamingHttpResponse((delta.text for delta in stream), content_type="text/plain; charset=utf-8")


async def tell_async(request):  # on ASGI: uvicorn, daphne
    async def texts():
        async for delta in bridge.astream(request.GET.get("prompt", ""), timeout=60):
            yield delta.text

    return StreamingHttpResponse(texts(), content_type="text/plain; charset=utf-8")


urlpatterns = [path("ask", ask), path("tell", tell), path("tell-async", tell_async)]

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
else:
    application = get_wsgi_application()  # gunicorn -k gthread --threads 64 django_app:application
    asgi = get_asgi_application()  # uvicorn django_app:asgi
