"""Dramatiq: acknowledged after the work."""

from __future__ import annotations

import sys
import threading
import time

import dramatiq
import job
import pika
from dramatiq.brokers.rabbitmq import RabbitmqBroker

broker = RabbitmqBroker(url=job.URL, confirm_delivery=True)
dramatiq.set_broker(broker)
_of_thread = threading.local()


def _channel() -> pika.adapters.blocking_connection.BlockingChannel:
    """One of this thread's own: pika's are not to be shared."""
    if not hasattr(_of_thread, "channel"):
        _of_thread.channel = pika.BlockingConnection(pika.URLParameters(job.URL)).channel()
        _of_thread.channel.confirm_delivery()
    return _of_thread.channel


@dramatiq.actor(queue_name=job.QUEUE)
def nothing(number: int, seconds: float) -> None:
    """The job."""
    job.begins(number)
    if seconds:
        time.sleep(seconds)
    if job.IS_TOLD:
        for word in job.WORDS:
            _channel().basic_publish(
                job.STATUS,
                job.routing_key(word),
                job.notification(number, word),
                pika.BasicProperties(content_type="application/json", delivery_mode=2),
            )
    job.ends(number)


if __name__ == "__main__":
    for each in range(int(sys.argv[1])):
        nothing.send(each, float(sys.argv[2]))
