_base_ = ['_base_/mocov2_views.py', '_base_/sgd_200e.py', '_base_/runtime.py']

dim = 128
clusters = 10000
data = dict(replace=True)
model = dict(
    type='InterCLRMoCo',
    queue_len=2**16,
    feat_dim=dim,
    momentum=0.999,
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='BN')),
    neck=dict(type='MoCoV2Neck', in_channels=2048, hid_channels=2048, out_channels=dim, with_avg_pool=True),
    head=dict(type='ContrastiveHead', temperature=0.2),
    memory_bank=dict(
        type='InterCLRMemory', length=1281167, feat_dim=dim, momentum=1., num_classes=clusters, min_cluster=20,
        debug=False),
    online_labels=True,
    neg_num=16384,
    neg_sampling='semihard',
    semihard_neg_pool_num=128000,
    semieasy_neg_pool_num=128000,
    intra_cos_marign_loss=False,
    intra_cos_margin=0,
    inter_cos_marign_loss=True,
    inter_cos_margin=-0.5,
    intra_loss_weight=0.75,
    inter_loss_weight=0.25,
    share_neck=True,
    num_classes=clusters)
custom_hooks = [
    dict(
        type='InterCLRHook',
        extractor=dict(samples_per_gpu=256, workers_per_gpu=8),
        clustering=dict(type='Kmeans', k=clusters, pca_dim=-1),
        centroids_update_interval=10,
        deal_with_small_clusters_interval=1,
        evaluate_interval=50,
        warmup_epochs=0,
        init_memory=True,
        initial=True,
        online_labels=True,
        interval=10),
]
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
