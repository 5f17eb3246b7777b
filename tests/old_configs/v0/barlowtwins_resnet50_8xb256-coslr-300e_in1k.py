_base_ = ['_base_/byol_views.py', '_base_/lars_200e.py', '_base_/runtime.py']

width = 8192
model = dict(
    type='BarlowTwins',
    backbone=dict(
        type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN'), zero_init_residual=True),
    neck=dict(
        type='NonLinearNeck', in_channels=2048, hid_channels=width, out_channels=width, num_layers=3,
        with_last_bn=False, with_last_bn_affine=False, with_avg_pool=True,
        init_cfg=dict(type='Kaiming', distribution='uniform', layer=['Linear'])),
    head=dict(type='LatentCrossCorrelationHead', in_channels=width))
data = dict(samples_per_gpu=256)
others = dict(weight_decay=0, lr_mult=0.024, lars_exclude=True)
optimizer = dict(
    lr=1.6,
    paramwise_options={'(bn|gn)(\\d+)?.(weight|bias)': others, 'bias': others, 'downsample.1': others})
lr_config = dict(by_epoch=False, min_lr=0.0016, warmup_ratio=1.6e-4)
runner = dict(max_epochs=300)
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
