"""gunicorn for an app that holds a model: one worker of many threads."""

bind = "127.0.0.1:8000"
workers = 1  # each would load the model
worker_class = "gthread"
threads = 128  # more than there are answers at once: each answer holds one, a probe needs one too
graceful_timeout = 60  # seconds at SIGTERM for answers that run; what supervises gunicorn must wait longer
timeout = 60  # for a worker that shows no sign of life; an answer may take longer than that
max_requests = 0  # a new worker loads the model again, and nobody is served meanwhile
