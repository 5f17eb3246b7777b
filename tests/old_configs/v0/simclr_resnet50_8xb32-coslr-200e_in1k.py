_base_ = ['_base_/mocov2_views.py', '_base_/lars_200e.py', '_base_/runtime.py']

strength = 1.0
flip = {'type': 'RandomHorizontalFlip'}
colors = dict(brightness=0.8 * strength, contrast=0.8 * strength, saturation=0.8 * strength)
train_pipeline = [
    dict(type='RandomResizedCrop', size=224),
    flip,
    dict(
        type='RandomAppliedTrans',
        transforms=[dict(type='ColorJitter', hue=0.2 * strength, **colors)],
        p=0.8),
    dict(type='RandomGrayscale', p=0.2),
    dict(type='GaussianBlur', sigma_min=0.1, sigma_max=2.0, p=0.5),
    dict(type='ToTensor'),
    dict(type='Normalize', **{{_base_.img_norm_cfg}}),
]
data = dict(train=dict(pipelines=[train_pipeline]))
model = dict(
    type='SimCLR',
    backbone=dict(
        type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN'), zero_init_residual=True),
    neck=dict(
        type='NonLinearNeck', in_channels=2048, hid_channels=2048, out_channels=128, num_layers=2, with_avg_pool=True),
    head=dict(type='ContrastiveHead', temperature=0.1))
optimizer = dict(
    lr=0.3,
    paramwise_options={
        '(bn|gn)(\\d+)?.(weight|bias)': dict(weight_decay=0., lars_exclude=True),
        'bias': dict(weight_decay=0., lars_exclude=True),
        'downsample.1': dict(weight_decay=0., lars_exclude=True),
    })
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
