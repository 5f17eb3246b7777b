_base_ = 'byol_resnet50_8xb32-accum16-coslr-200e_in1k.py'

apart = dict(decay_mult=0, lr_mult=0.024, lars_exclude=True)
train_dataloader = dict(batch_size=256)
model = dict(
    _delete_=True,
    type='BarlowTwins',
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN'), zero_init_residual=True),
    neck=dict(
        type='NonLinearNeck', in_channels=2048, hid_channels=8192, out_channels=8192, num_layers=3,
        with_last_bn=False, with_last_bn_affine=False, with_avg_pool=True,
        init_cfg=dict(type='Kaiming', distribution='uniform', layer=['Linear'])),
    head=dict(type='LatentCrossCorrelationHead', in_channels=8192, loss=dict(type='CrossCorrelationLoss')))
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='LARS', lr=1.6, weight_decay=1e-6, momentum=0.9),
    paramwise_cfg=dict(custom_keys={'bn': apart, 'bias': apart, 'downsample.1': apart}))
param_scheduler = [
    dict(type='LinearLR', start_factor=1.6e-4, by_epoch=True, begin=0, end=10, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR', T_max=290, eta_min=0.0016, by_epoch=True, begin=10, end=300,
        convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=300)
