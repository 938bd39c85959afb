"""The Apache Beam pipeline of ``nd-jax data precompute``: one element a shard, on whatever runner Beam is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions

from nd_jax.data.latent_shards import is_finished
from nd_jax.errors import UserError
from nd_jax.precompute import Place, encode_shard, note_failure
from nd_jax.precompute_networks import Encoder, Job

SPACE = "nd_jax"
"""Of the counters ``records``, ``clips``, ``skipped``, ``shards`` and ``failed``, which runners show."""


class EncodeShard(beam.DoFn):
    """Makes shards; networks are loaded once a worker, and not at all where a retry finds everything made."""

    def __init__(self, job: Job):
        self.job, self.encoder = job, None

    def process(self, place: Place) -> Iterator[Place]:
        """Yields the shard when it is there. A reason that no retry would mend is left beside it, for ``finish``."""
        place = (place[0], place[1])
        if not is_finished(self.job.out, *place):
            try:
                if self.encoder is None:
                    self.encoder = Encoder(self.job)
                shard = encode_shard(self.job, place, self.encoder)
            except UserError as error:
                Metrics.counter(SPACE, "failed").inc()
                note_failure(self.job, place, str(error))
                return
            counts = {"records": shard.records, "clips": shard.clips, "skipped": len(shard.skipped), "shards": 1}
            for name, count in counts.items():
                Metrics.counter(SPACE, name).inc(count)
        yield place

    def __getstate__(self) -> dict:
        return {"job": self.job, "encoder": None}  # networks do not travel


def run_pipeline(job: Job, places: Sequence[Place], options: Sequence[str] = ()) -> None:
    """Make the shards. ``options`` are Beam's own flags, such as ``--runner=FlinkRunner``; by default all is done here.

    Raises UserError when the runner fails; shards that are finished stay.
    """
    try:
        pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
        shards = pipeline | "shards" >> beam.Create(list(places)) | "spread" >> beam.Reshuffle()
        _ = shards | "encode" >> beam.ParDo(EncodeShard(job))
        pipeline.run().wait_until_finish()
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:  # each runner has its own
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data precompute: the pipeline failed ({told[-300:]}); finished shards are kept, run it again"
        ) from error
