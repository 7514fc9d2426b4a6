"""How the embedded base model `icons` is made, step by step.

Run the steps from the root of the repository, in this order:

    python -m scripts.build_base.fetch        # icon sets and keywords, from npm
    python -m scripts.build_base.render       # drawings at 128 px, packed into one zip
    python -m scripts.build_base.train_vae    # on a GPU, about seven minutes
    python -m scripts.build_base.train_unet   # on a GPU, about sixteen minutes
    python -m scripts.build_base.export       # an ordinary diffusers folder
    python -m scripts.build_base.check_base   # the figures that the model card quotes

And the embedded language model `tiny-lm`, on a CPU:

    python -m scripts.build_base.lm_text      # dictionaries, and the sample, from Debian's packages
    python -m scripts.build_base.train_lm     # about 35 minutes on one core; goes on where it was stopped
"""
