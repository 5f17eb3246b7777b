# Biases and norms are neither decayed nor scaled; the norm of a shortcut has no name that says so.
apart = dict(decay_mult=0, lars_exclude=True)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='LARS', lr=4.8, weight_decay=1e-6, momentum=0.9),
    paramwise_cfg=dict(custom_keys={'bn': apart, 'bias': apart, 'downsample.1': apart}))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, by_epoch=True, begin=0, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=190, by_epoch=True, begin=10, end=200),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=200)
