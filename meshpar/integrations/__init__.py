"""Parallel models in the trainers people use. Each file needs the tool it is called after, and is imported by itself.

    from meshpar.integrations.transformers import parallel        Trainer, Seq2SeqTrainer, any subclass
    from meshpar.integrations.trl import SFTTrainer
    from meshpar.integrations.accelerate import Accelerator
    from meshpar.integrations.lightning import FabricStrategy, TrainerStrategy
    from meshpar.integrations.peft import save_adapter, load_adapter

All of them read data by data rank, check in every step that ranks which share a batch have the same one, and leave precision, sharding and
recomputing to `parallelize`.
"""
