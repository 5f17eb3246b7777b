_base_ = ['_base_/views.py', '_base_/steps_200e.py', '_base_/runtime.py']

train_pipeline = [
    _base_.load,
    dict(type='Resize', scale=292, backend='pillow'),
    dict(type='RandomCrop', size=255),
    dict(_base_.gray, prob=0.66),
    dict(type='RandomPatchWithLabels'),
    dict(
        type='PackSelfSupInputs',
        pseudo_label_keys=['patch_box', 'patch_label', 'unpatched_img'],
        meta_keys=['img_path']),
]
train_dataloader = dict(batch_size=64, num_workers=4, dataset=dict(pipeline=train_pipeline))
model = dict(
    type='RelativeLoc',
    data_preprocessor=dict(
        type='mmselfsup.RelativeLocDataPreprocessor', mean=[124, 117, 104], std=[59, 58, 58], bgr_to_rgb=True),
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='BN')),
    neck=dict(type='RelativeLocNeck', in_channels=2048, out_channels=4096, with_avg_pool=True),
    head=dict(
        type='ClsHead', loss=dict(type='mmcls.CrossEntropyLoss'), with_avg_pool=False, in_channels=4096, num_classes=8,
        init_cfg=[
            dict(type='Normal', std=0.005, layer='Linear'),
            dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
        ]))
optim_wrapper = dict(
    optimizer=dict(lr=0.2),
    paramwise_cfg=dict(custom_keys={'neck': dict(decay_mult=5.0), 'head': dict(decay_mult=5.0)}))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='MultiStepLR', by_epoch=True, milestones=[30, 50], gamma=0.1),
]
train_cfg = dict(max_epochs=70)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
