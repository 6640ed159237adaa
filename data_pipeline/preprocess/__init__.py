"""From sources to shards. Start reading at :mod:`data_pipeline.preprocess.coordinator`."""
