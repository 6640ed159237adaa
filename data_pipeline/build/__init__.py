"""From sources to shards. Start reading at :mod:`data_pipeline.build.coordinator`."""
