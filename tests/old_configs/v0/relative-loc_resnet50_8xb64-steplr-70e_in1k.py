_base_ = ['_base_/source.py', '_base_/sgd_200e.py', '_base_/runtime.py']

img_norm_cfg = dict(mean=[124 / 255, 117 / 255, 104 / 255], std=[59 / 255, 58 / 255, 58 / 255])
data = dict(
    samples_per_gpu=64,
    workers_per_gpu=8,
    drop_last=True,
    train=dict(
        type='RelativeLocDataset',
        data_source={{_base_.source}},
        pipeline=[
            dict(type='Resize', size=292),
            dict(type='RandomCrop', size=255),
            dict(type='RandomGrayscale', p=0.66),
        ],
        format_pipeline=[dict(type='ToTensor'), dict(type='Normalize', **img_norm_cfg)]))
model = dict(
    type='RelativeLoc',
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='BN')),
    neck=dict(type='RelativeLocNeck', in_channels=2048, out_channels=4096, with_avg_pool=True),
    head=dict(
        type='ClsHead', with_avg_pool=False, in_channels=4096, num_classes=8,
        init_cfg=[
            dict(type='Normal', std=0.005, layer='Linear'),
            dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
        ]))
optimizer = dict(
    lr=0.2, paramwise_options={'\\Aneck.': dict(weight_decay=5e-4), '\\Ahead.': dict(weight_decay=5e-4)})
lr_config = dict(
    _delete_=True, policy='step', step=[30, 50],
    warmup='linear', warmup_iters=5, warmup_ratio=0.1, warmup_by_epoch=True)
runner = dict(max_epochs=70)
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
