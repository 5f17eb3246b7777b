_base_ = ['_base_/views.py', '_base_/lars_200e.py', '_base_/runtime.py']

view_pipeline = [
    dict(type='RandomResizedCrop', size=224, backend='pillow'),
    _base_.flip,
    dict(
        type='RandomApply',
        transforms=[dict(type='ColorJitter', brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)],
        prob=0.8),
    _base_.gray,
    _base_.blur,
]
_base_.train_pipeline[1].transforms = [view_pipeline]  # a live object: the loader's dataset has it too
model = dict(
    type='SimCLR',
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN'), zero_init_residual=True),
    neck=dict(
        type='NonLinearNeck', in_channels=2048, hid_channels=2048, out_channels=128, num_layers=2, with_avg_pool=True),
    head=dict(type='ContrastiveHead', loss=dict(type='mmcls.CrossEntropyLoss'), temperature=0.1))
optim_wrapper = dict(optimizer=dict(lr=0.3))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
