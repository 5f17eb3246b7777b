import copy

_base_ = ['_base_/byol_views.py', '_base_/lars_200e.py', '_base_/runtime.py']

first = [
    dict(type='RandomResizedCrop', size=224, scale=(0.2, 1.)),
    dict(
        type='RandomAppliedTrans',
        transforms=[dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)],
        p=0.8),
    dict(type='RandomGrayscale', p=0.2),
    dict(type='GaussianBlur', sigma_min=0.1, sigma_max=2.0, p=1.),
    dict(type='Solarization', p=0.),
    dict(type='RandomHorizontalFlip'),
    dict(type='ToTensor'),
    dict(type='Normalize', **{{_base_.img_norm_cfg}}),
]
second = copy.deepcopy(first)
second[3]['p'] = 0.1
second[4]['p'] = 0.2
pair = [first, second]
data = dict(samples_per_gpu=512, train=dict(pipelines=pair))
projector = dict(
    type='NonLinearNeck', hid_channels=4096, out_channels=256, num_layers=2, with_bias=False, with_last_bn=True,
    with_last_bn_affine=False, with_last_bias=False)
model = dict(
    type='MoCoV3',
    base_momentum=0.99,
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN')),
    neck=dict(in_channels=2048, with_avg_pool=True, vit_backbone=False, **projector),
    head=dict(
        type='MoCoV3Head',
        predictor=dict(
            type='NonLinearNeck', in_channels=256, hid_channels=4096, out_channels=256, num_layers=2, with_bias=False,
            with_last_bn=False, with_last_bn_affine=False, with_last_bias=False, with_avg_pool=False),
        temperature=1.0))
custom_hooks = [dict(type='MomentumUpdateHook')]
optimizer = dict(
    lr=9.6,
    paramwise_options={
        '(bn|gn)(\\d+)?.(weight|bias)': dict(weight_decay=0., lars_exclude=True),
        'bias': dict(weight_decay=0., lars_exclude=True),
        'downsample.1': dict(weight_decay=0., lars_exclude=True),
    })
lr_config = dict(by_epoch=False)
runner = dict(max_epochs=100)
fp16 = dict(loss_scale='dynamic')
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
