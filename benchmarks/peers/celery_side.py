"""Celery: acknowledged late, so that a killed worker's tasks are not lost."""

from __future__ import annotations

import sys
import time

import job
from celery import Celery
from kombu import Exchange

app = Celery("peer", broker=job.URL)
app.conf.update(
    task_default_queue=job.QUEUE,
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=100,
    broker_transport_options={"confirm_publish": True},
)
_STATUS = Exchange(job.STATUS, "topic", durable=True)


@app.task(name="nothing")
def nothing(number: int, seconds: float) -> None:
    """The job."""
    job.begins(number)
    if seconds:
        time.sleep(seconds)
    if job.IS_TOLD:
        with app.producer_pool.acquire(block=True) as producer:
            for word in job.WORDS:
                producer.publish(
                    job.notification(number, word),
                    exchange=_STATUS,
                    routing_key=job.routing_key(word),
                    content_type="application/json",
                    content_encoding="utf-8",
                    delivery_mode=2,
                )
    job.ends(number)


if __name__ == "__main__":
    with app.producer_pool.acquire(block=True) as one:
        for each in range(int(sys.argv[1])):
            nothing.apply_async((each, float(sys.argv[2])), producer=one)
